//! What a request's entry says.

use bytes::Bytes;

use super::state::Refusal;
use super::xml::{self, Element};
use crate::contact::{NAMESPACE, Source};

/// The name in the entry of a list.
pub(super) fn list_name(body: &Bytes) -> Result<String, Refusal> {
    let document = xml::parse(body).ok_or_else(malformed)?;
    let list = document.find(NAMESPACE, "ContactList").ok_or_else(|| {
        Refusal::BadRequest("Error 400: there is no ContactList in the entry".into())
    })?;
    Ok(list.child("Name").map(|name| name.text.trim().to_owned()).unwrap_or_default())
}

/// What a contact entry says.
pub(super) struct Sent {
    pub email: String,
    pub declared: Option<Source>,
    /// Every known value in the body, in its order.
    pub sources: Vec<Source>,
    /// Id and own source of each list.
    pub lists: Vec<(String, Option<Source>)>,
    pub fields: Vec<(String, String)>,
}

impl Sent {
    pub fn read(body: &Bytes) -> Result<Self, Refusal> {
        let document = xml::parse(body).ok_or_else(malformed)?;
        let contact = document.find(NAMESPACE, "Contact").ok_or_else(|| {
            Refusal::BadRequest("Error 400: there is no Contact in the entry".into())
        })?;
        let source = |element: &Element| match element.text.trim() {
            "ACTION_BY_CONTACT" => Some(Source::Contact),
            "ACTION_BY_CUSTOMER" => Some(Source::Customer),
            _ => None,
        };
        let declared = contact.children("OptInSource").find_map(source);
        let mut sources = Vec::new();
        document.visit(&mut |element| {
            if element.name == "OptInSource" && element.namespace == NAMESPACE {
                sources.extend(source(element));
            }
        });
        let lists: Vec<(String, Option<Source>)> = contact
            .children("ContactLists")
            .flat_map(|lists| lists.children("ContactList"))
            .map(|list| (list.id.clone(), list.children("OptInSource").find_map(source)))
            .collect();
        let special = [
            "EmailAddress",
            "OptInSource",
            "ContactLists",
            "Status",
            "OptInTime",
            "InsertTime",
            "LastUpdateTime",
        ];
        Ok(Self {
            email: contact
                .child("EmailAddress")
                .map(|it| it.text.trim().to_owned())
                .unwrap_or_default(),
            declared,
            sources,
            fields: contact
                .children
                .iter()
                .filter(|child| {
                    child.children.is_empty() && !special.contains(&child.name.as_str())
                })
                .map(|child| (child.name.clone(), child.text.clone()))
                .collect(),
            lists,
        })
    }
}

fn malformed() -> Refusal {
    Refusal::BadRequest("Error 400: the entry is not well-formed XML".into())
}
