//! What the operator may choose: each setting of SPEC section 1's table, and its values.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Kind, Source};

/// What to do about each kind of inconsistency: the `[sanitize]` section of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    /// Whether to change anything.
    pub mode: Mode,
    /// A list source that differs from the declaration.
    pub lists: Lists,
    /// A contact without a declaration.
    pub undeclared: Undeclared,
    /// A contact with contradictory declarations.
    pub ambiguous: Ambiguous,
    /// A removal declared as the contact's own act, which the API refuses (API-V1: "What the values mean").
    pub removal: Removal,
    /// Leave ids under the proxy's own origin instead of restoring the API's.
    pub keep_own_ids: bool,
    /// Other spellings, and the value that each stands for.
    pub aliases: BTreeMap<String, Source>,
}

impl Policy {
    /// The setting that decides what becomes of a finding of this kind, as it is written in a configuration.
    pub const fn setting(&self, kind: Kind) -> &'static str {
        match (self.mode, kind) {
            (Mode::Observe | Mode::Off, _) => "sanitize.mode=observe",
            (_, Kind::ListDiffers) => match self.lists {
                Lists::Align => "sanitize.lists=align",
                Lists::Strip => "sanitize.lists=strip",
                Lists::Leave => "sanitize.lists=leave",
            },
            (_, Kind::Undeclared | Kind::ListsDisagree) => match self.undeclared {
                Undeclared::Leave => "sanitize.undeclared=leave",
                Undeclared::FromLists => "sanitize.undeclared=from-lists",
                Undeclared::Customer => "sanitize.undeclared=customer",
                Undeclared::Contact => "sanitize.undeclared=contact",
            },
            (_, Kind::Ambiguous) => match self.ambiguous {
                Ambiguous::Leave => "sanitize.ambiguous=leave",
                Ambiguous::First => "sanitize.ambiguous=first",
                Ambiguous::Last => "sanitize.ambiguous=last",
                Ambiguous::Customer => "sanitize.ambiguous=customer",
                Ambiguous::Contact => "sanitize.ambiguous=contact",
            },
            (_, Kind::RemovalByContact) => match self.removal {
                Removal::Customer => "sanitize.removal=customer",
                Removal::Leave => "sanitize.removal=leave",
            },
            (_, Kind::UnknownValue) => "sanitize.aliases",
            (_, Kind::OwnOrigin) => {
                if self.keep_own_ids {
                    "sanitize.restore_ids=false"
                } else {
                    "sanitize.restore_ids=true"
                }
            }
        }
    }
}

/// `sanitize.mode`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Report and change.
    #[default]
    Enforce,
    /// Report all, change nothing.
    Observe,
    /// Do not look.
    Off,
}

/// `sanitize.lists`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Lists {
    /// Set it to the declaration.
    #[default]
    Align,
    /// Remove the list's OptInSource and OptInTime.
    Strip,
    /// Report it only.
    Leave,
}

/// `sanitize.undeclared`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Undeclared {
    /// Report it only.
    #[default]
    Leave,
    /// Declare what all lists say, if all say the same. Can claim more consent than declared.
    FromLists,
    /// Declare ACTION_BY_CUSTOMER.
    Customer,
    /// Declare ACTION_BY_CONTACT. Claims consent that nobody declared.
    Contact,
}

/// `sanitize.ambiguous`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ambiguous {
    /// Report it only.
    #[default]
    Leave,
    /// The first one's value holds, if it is a known one. Can claim more consent than declared.
    First,
    /// The last one's value holds, if it is a known one. Can claim more consent than declared.
    Last,
    /// ACTION_BY_CUSTOMER holds.
    Customer,
    /// ACTION_BY_CONTACT holds. Can claim more consent than declared.
    Contact,
}

/// `sanitize.removal`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Removal {
    /// Set it to ACTION_BY_CUSTOMER.
    #[default]
    Customer,
    /// Report it only.
    Leave,
}
