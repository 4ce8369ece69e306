//! A second opinion: SPEC's default policy, written down again over a tree that another XML parser
//! made, as plainly as possible.

use std::collections::BTreeMap;

use optin_proxy::contact::{Kind, NAMESPACE};
use roxmltree::{Document, Node};

use super::{C, U};

/// What must be found, and what every `OptInSource` that counts must say afterwards, by its position
/// among all nodes of the document.
#[derive(Debug, Default)]
pub struct Opinion {
    pub findings: BTreeMap<&'static str, usize>,
    pub values: BTreeMap<usize, String>,
}

fn is(node: Node<'_, '_>, name: &str) -> bool {
    node.has_tag_name((NAMESPACE, name))
}

/// The value of a node: `None` if it has child elements.
pub fn value(node: Node<'_, '_>) -> Option<String> {
    if node.children().any(|child| child.is_element()) {
        return None;
    }
    let text: String =
        node.children().filter(Node::is_text).filter_map(|text| text.text()).collect();
    Some(text.trim_matches([' ', '\t', '\r', '\n']).to_owned())
}

fn is_known(value: &Option<String>) -> bool {
    value.as_deref().is_some_and(|value| value == C || value == U)
}

fn is_empty(value: &Option<String>) -> bool {
    value.as_deref() == Some("")
}

/// The contact-level and the list-level nodes of a contact.
pub fn sources<'a, 'i>(contact: Node<'a, 'i>) -> (Vec<Node<'a, 'i>>, Vec<Node<'a, 'i>>) {
    let named = |parent: Node<'a, 'i>, name: &'static str| {
        parent.children().filter(move |child| is(*child, name)).collect::<Vec<_>>()
    };
    let listed = named(contact, "ContactLists")
        .into_iter()
        .flat_map(|lists| named(lists, "ContactList"))
        .flat_map(|list| named(list, "OptInSource"))
        .collect();
    (named(contact, "OptInSource"), listed)
}

pub fn contacts<'a, 'i>(document: &'a Document<'i>) -> impl Iterator<Item = Node<'a, 'i>> {
    document.descendants().filter(|node| is(*node, "Contact"))
}

pub fn opinion(document: &Document<'_>, update: bool) -> Opinion {
    let mut opinion = Opinion::default();
    for contact in contacts(document) {
        let mut found = |kind: Kind| *opinion.findings.entry(kind.as_str()).or_default() += 1;
        let (declared, listed) = sources(contact);
        let removal = update && !contact.descendants().any(|node| is(node, "ContactList"));
        let values: Vec<_> = declared.iter().map(|node| value(*node)).collect();
        // What holds elements is equal to nothing.
        let ambiguous = values.windows(2).any(|pair| pair[0] != pair[1] || pair[0].is_none());
        let declaration = match values.first() {
            Some(first) if !ambiguous && is_known(first) => first.clone(),
            _ => None,
        };
        let undeclared = !ambiguous && values.first().is_none_or(is_empty);
        for value in &values {
            if !is_known(value) && !is_empty(value) {
                found(Kind::UnknownValue);
            }
        }
        if ambiguous {
            found(Kind::Ambiguous);
        }
        let list_values: Vec<_> = listed.iter().map(|node| value(*node)).collect();
        if undeclared {
            found(Kind::Undeclared);
            let said: Vec<_> =
                list_values.iter().filter(|value| is_known(value) || is_empty(value)).collect();
            if said.windows(2).any(|pair| pair[0] != pair[1]) {
                found(Kind::ListsDisagree);
            }
        }
        let mut outgoing = declaration.clone();
        if removal && declaration.as_deref() == Some(C) {
            found(Kind::RemovalByContact);
            outgoing = Some(U.to_owned());
        }
        for (node, before) in declared.iter().zip(&values) {
            let after = outgoing.clone().or_else(|| before.clone());
            opinion.values.insert(node.id().get_usize(), after.unwrap_or_default());
        }
        for (node, before) in listed.iter().zip(&list_values) {
            let differs = declaration.is_some() && *before != declaration;
            if differs {
                found(Kind::ListDiffers);
            } else if declaration.is_none() && !is_known(before) && !is_empty(before) {
                found(Kind::UnknownValue);
            }
            let after = if differs { declaration.clone() } else { before.clone() };
            opinion.values.insert(node.id().get_usize(), after.unwrap_or_default());
        }
    }
    opinion
}

/// Everything in a document but the content of the sources that count (and, if told so, times and
/// sources altogether), in its order.
pub fn skeleton(document: &Document<'_>, without_sources: bool) -> Vec<String> {
    let counted: Vec<_> = contacts(document)
        .flat_map(|contact| {
            let (declared, listed) = sources(contact);
            declared.into_iter().chain(listed)
        })
        .collect();
    let is_time = |node: Node<'_, '_>| is(node, "OptInTime");
    let mut lines = Vec::new();
    for node in document.descendants() {
        let inside = node.ancestors().skip(1).any(|above| counted.contains(&above));
        let dropped = without_sources
            && node.ancestors().any(|above| counted.contains(&above) || is_time(above));
        if inside || dropped {
            continue;
        }
        let attributes: Vec<_> =
            node.attributes().map(|it| format!("{}={:?}", it.name(), it.value())).collect();
        let depth = node.ancestors().count();
        let text = if node.is_element() { None } else { node.text() };
        lines.push(format!(
            "{depth} {:?} {:?} {attributes:?} {text:?}",
            node.node_type(),
            node.tag_name()
        ));
    }
    lines
}
