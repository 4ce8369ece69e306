//! One line of an audit trail, as far as it is counted. Text is borrowed from the line where it can be.

use std::borrow::Cow;
use std::fmt;

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// A string that is borrowed unless it had to be unescaped. `Cow` alone would be copied within an `Option`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Text<'l>(pub Cow<'l, str>);

impl<'de: 'l, 'l> Deserialize<'de> for Text<'l> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;

        impl<'de> Visitor<'de> for Reader {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }

        deserializer.deserialize_str(Reader)
    }
}

/// A line of an exchange, or one that tells of lost ones.
#[derive(Debug, Deserialize)]
pub(super) struct Line<'l> {
    #[serde(borrow)]
    pub time: Text<'l>,
    pub seq: u64,
    #[serde(borrow, default)]
    pub event: Option<Text<'l>>,
    #[serde(default)]
    pub lost: u64,
    #[serde(borrow, default)]
    pub account: Option<Text<'l>>,
    #[serde(borrow, default)]
    pub user_agent: Option<Text<'l>>,
    #[serde(borrow, default)]
    pub outcome: Option<Text<'l>>,
    #[serde(borrow, default)]
    pub findings: Findings<'l>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Finding<'l> {
    #[serde(borrow)]
    pub kind: Text<'l>,
    #[serde(borrow, default)]
    pub list_id: Option<Text<'l>>,
    #[serde(default)]
    pub changed: bool,
}

/// Findings, most of which have no need of an allocation.
#[derive(Debug, Default)]
pub(super) struct Findings<'l>(pub Vec<Finding<'l>>);

impl<'de: 'l, 'l> Deserialize<'de> for Findings<'l> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;

        impl<'de> Visitor<'de> for Reader {
            type Value = Findings<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("findings")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut all: A) -> Result<Findings<'de>, A::Error> {
                let mut findings = Vec::with_capacity(8);
                while let Some(finding) = all.next_element()? {
                    findings.push(finding);
                }
                Ok(Findings(findings))
            }
        }

        deserializer.deserialize_seq(Reader)
    }
}
