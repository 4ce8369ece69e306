//! Where a finding is likely to come from: what clients of each family were seen to do (API-V1: "What real
//! clients send on an update").

use crate::contact::{Kind, Source};

/// What in the application's code is likely to cause this.
///
/// `was`: what was there, as far as that is one of the known values.
pub fn of(kind: Kind, declared: Option<Source>, was: &str) -> &'static str {
    match (kind, declared, was) {
        (Kind::ListDiffers, Some(Source::Contact), "ACTION_BY_CUSTOMER") => {
            "It gets the contact, adds an OptInSource and puts everything back: each ContactList still has the \
             OptInSource of its history. Leave OptInSource and OptInTime out of the lists that are put back."
        }
        (Kind::ListDiffers, Some(Source::Customer), "ACTION_BY_CONTACT") => {
            "The owner's update echoes lists that the subscriber had joined. Leave OptInSource and OptInTime out of \
             the lists that are put back."
        }
        (Kind::ListDiffers, ..) => {
            "A list has an OptInSource of its own. Leave OptInSource and OptInTime out of the lists that are put back."
        }
        (Kind::Undeclared, ..) => {
            "The update has no OptInSource beside EmailAddress, or an empty one: it is dropped where a list has one \
             already, or never added to what was got. Set it on the contact before the update."
        }
        (Kind::Ambiguous, ..) => {
            "A default is written first and the caller's own OptInSource after it, or one from a search is kept \
             beside it. Replace the OptInSource instead of adding one."
        }
        (Kind::ListsDisagree, ..) => {
            "Old lists keep the OptInSource of their history, new ones get the caller's, and the contact none. Set \
             it on the contact."
        }
        (Kind::RemovalByContact, ..) => {
            "The last list is taken away as the contact's own act, which the API refuses. Use ACTION_BY_CUSTOMER for \
             that, or DELETE to unsubscribe."
        }
        (Kind::UnknownValue, _, "ACTION_BY_CLIENT") => {
            "ACTION_BY_CLIENT is no value of the API. It is mistaken for ACTION_BY_CUSTOMER or ACTION_BY_CONTACT; \
             [sanitize.aliases] can say which."
        }
        (Kind::UnknownValue, _, "ACTION_BY_SYSTEM") => {
            "ACTION_BY_SYSTEM is read-only: a value that was got is put back. Set one of the two that may be written."
        }
        (Kind::UnknownValue, ..) => {
            "An OptInSource that the API does not know. Only ACTION_BY_CUSTOMER and ACTION_BY_CONTACT may be written."
        }
        (Kind::OwnOrigin, ..) => {
            "Ids of lists are built from the base URL of the API, which is the proxy's here. Nothing is wrong with \
             that: the proxy puts the API's back."
        }
    }
}
