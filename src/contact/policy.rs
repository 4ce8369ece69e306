//! What is inconsistent in a contact, and what to do about it: SPEC section 1's table as code.
//!
//! The one rule above all others: with the default [`Policy`], no edit writes ACTION_BY_CONTACT unless
//! exactly that was the contact's one, unambiguous declaration.

use super::Source;
use super::document::{Document, Node, Spelling};
use super::edit::{Bridge, Edit, Edits, With};
use super::findings::{Finding, Findings, Kind, Place, Was, Written};
use super::settings::{Ambiguous, Lists, Mode, Policy, Removal, Undeclared};

/// How many findings there is room for at first.
const FEW: usize = 16;

/// Findings and the edits that they lead to.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Plan {
    pub findings: Findings,
    /// Sorted by their start, without overlap.
    pub edits: Edits,
    /// Once edited, some contact-level node says ACTION_BY_CONTACT.
    pub claims_contact: bool,
}

/// Judges every contact of a document.
pub(super) fn plan(document: &Document, update: bool, policy: &Policy) -> Plan {
    let mut plan = Plan::default();
    let verdicts = judge_contacts(document, update, policy, &mut plan);
    let stripped = plan_stripping(document, &verdicts, policy, &mut plan);
    for node in &document.nodes {
        let verdict = &verdicts[node.contact as usize];
        match node.list {
            None => plan_declaration(node, verdict, policy, &mut plan),
            Some(list) => {
                // Asked of nodes that differ, whose lists all are, and of aliases, which have no copies.
                let stripped = stripped.get(list as usize) == Some(&true);
                plan_list(document, node, verdict, stripped, policy, &mut plan);
            }
        }
    }
    for id in &document.own_ids {
        let restore = !policy.keep_own_ids;
        let finding = Finding {
            kind: Kind::OwnOrigin,
            was: Was::OwnOrigin(id.written.clone()),
            now: if restore { Written::ApiOrigin } else { Written::Nothing },
            declared: None,
        };
        let list_id = id.list.and_then(|list| document.lists[list as usize].id);
        plan.findings.push(finding, Place { list_id, at: id.origin.start() as u32 });
        if restore {
            plan.edits.push(id.restored());
        }
    }
    if policy.mode == Mode::Observe {
        plan.edits.clear();
        plan.findings.rows_mut().for_each(|finding| finding.now = Written::Nothing);
        plan.claims_contact = document
            .nodes
            .iter()
            .any(|node| node.list.is_none() && node.spelling == Spelling::Known(Source::Contact));
    }
    plan.edits.sort();
    plan
}

/// What was decided for one contact as a whole.
struct Verdict {
    /// The value that its lists are held against: declared, or filled in by a setting.
    declared: Option<Source>,
    /// The value that all its contact-level nodes are set to.
    overrule: Option<Source>,
}

/// The value of a node with aliases looked up.
#[derive(Clone, Copy, PartialEq)]
enum Meaning<'d> {
    Empty,
    Known(Source),
    Unknown(&'d str),
}

fn meaning<'d>(node: &'d Node, policy: &Policy) -> Meaning<'d> {
    match &node.spelling {
        Spelling::Empty => Meaning::Empty,
        Spelling::Known(source) => Meaning::Known(*source),
        Spelling::Other(text) => match policy.aliases.get(&**text) {
            Some(source) => Meaning::Known(*source),
            None => Meaning::Unknown(text),
        },
    }
}

/// What the nodes of one contact say, taken together.
#[derive(Default)]
struct Statements<'d> {
    /// Contact level: the first and the last value, and whether any two differ.
    declarations: Option<(Meaning<'d>, Meaning<'d>)>,
    contradictory: bool,
    /// List level, where the contact level does not say it all: the first value that is not unknown, and whether any
    /// other differs from it.
    listed: Option<Meaning<'d>>,
    disagree: bool,
    /// Lists in all, and those whose every source is known.
    lists: usize,
    lists_known: usize,
}

fn gather<'d>(document: &'d Document, policy: &Policy) -> Vec<Statements<'d>> {
    let mut all: Vec<Statements<'d>> = Vec::new();
    all.resize_with(document.contacts.len(), Statements::default);
    for node in document.nodes.iter().filter(|node| node.list.is_none()) {
        let statements = &mut all[node.contact as usize];
        let meaning = meaning(node, policy);
        let (first, last) = statements.declarations.get_or_insert((meaning, meaning));
        statements.contradictory |= *first != meaning;
        *last = meaning;
    }
    // Nearly all contacts declare, and some have thousands of lists.
    if all.iter().any(|it| !matches!(it.declarations, Some((Meaning::Known(_), _)))) {
        gather_lists(document, policy, &mut all);
    }
    all
}

fn gather_lists<'d>(document: &'d Document, policy: &Policy, all: &mut [Statements<'d>]) {
    let mut known: Vec<Option<bool>> = vec![None; document.lists.len()];
    for node in document.nodes.iter().filter(|node| node.list.is_some()) {
        let statements = &mut all[node.contact as usize];
        let meaning = meaning(node, policy);
        let is_known = matches!(meaning, Meaning::Known(_));
        for copy in document.occurrences(node) {
            known[copy.number] = Some(known[copy.number].unwrap_or(true) && is_known);
        }
        // An unknown value is a finding of its own, and counts as that alone.
        if !matches!(meaning, Meaning::Unknown(_)) {
            let first = *statements.listed.get_or_insert(meaning);
            statements.disagree |= first != meaning;
        }
    }
    for (list, known) in document.lists.iter().zip(known) {
        let statements = &mut all[list.contact as usize];
        statements.lists += 1;
        statements.lists_known += usize::from(known == Some(true));
    }
}

fn judge_contacts(
    document: &Document,
    update: bool,
    policy: &Policy,
    plan: &mut Plan,
) -> Vec<Verdict> {
    let all = gather(document, policy);
    let contacts = document.contacts.iter().zip(all);
    contacts
        .map(|(contact, said)| {
            let removal = update && !contact.holds_list;
            // No removal leaves as the contact's act, whoever declared it.
            let removable = |source| match source {
                Source::Contact if removal && policy.removal == Removal::Customer => {
                    Source::Customer
                }
                source => source,
            };
            let mut report = |kind, was, filled: Option<Source>| {
                let declared = match was {
                    Was::Known(source) => Some(source),
                    _ => None,
                };
                let now = filled.map_or(Written::Nothing, Written::Value);
                let at = contact.tag.start() as u32;
                let finding = Finding { kind, was, now, declared };
                plan.findings.push(finding, Place { list_id: None, at });
            };
            match said.declarations {
                Some((first, last)) if said.contradictory => {
                    let known = |meaning| match meaning {
                        Meaning::Known(source) => Some(source),
                        _ => None,
                    };
                    let chosen = match policy.ambiguous {
                        Ambiguous::Leave => None,
                        Ambiguous::First => known(first),
                        Ambiguous::Last => known(last),
                        Ambiguous::Customer => Some(Source::Customer),
                        Ambiguous::Contact => Some(Source::Contact),
                    };
                    let chosen = chosen.map(removable);
                    report(Kind::Ambiguous, Was::Several, chosen);
                    Verdict { declared: chosen, overrule: chosen }
                }
                Some((Meaning::Known(source), _)) => {
                    let mut verdict = Verdict { declared: Some(source), overrule: None };
                    if removal && source == Source::Contact {
                        if removable(source) != source {
                            verdict.overrule = Some(removable(source));
                        }
                        report(Kind::RemovalByContact, Was::Known(source), verdict.overrule);
                    }
                    verdict
                }
                Some((Meaning::Unknown(_), _)) => Verdict { declared: None, overrule: None },
                None | Some((Meaning::Empty, _)) => {
                    let agreed = match said.listed {
                        Some(Meaning::Known(source))
                            if !said.disagree && said.lists_known == said.lists =>
                        {
                            Some(source)
                        }
                        _ => None,
                    };
                    let filled = match policy.undeclared {
                        Undeclared::Leave => None,
                        Undeclared::FromLists => agreed,
                        Undeclared::Customer => Some(Source::Customer),
                        Undeclared::Contact => Some(Source::Contact),
                    };
                    let filled = filled.map(removable);
                    report(Kind::Undeclared, Was::Empty, filled);
                    if said.disagree {
                        report(Kind::ListsDisagree, Was::Several, filled);
                    }
                    if said.declarations.is_none()
                        && let Some(source) = filled
                    {
                        plan.edits.push(contact.declare(source));
                        plan.claims_contact |= source == Source::Contact;
                    }
                    Verdict { declared: filled, overrule: filled }
                }
            }
        })
        .collect()
}

/// A contact-level node: follows what was decided for its contact, else what its alias stands for.
fn plan_declaration(node: &Node, verdict: &Verdict, policy: &Policy, plan: &mut Plan) {
    let meaning = meaning(node, policy);
    let stands_for = match meaning {
        Meaning::Known(source) => Some(source),
        _ => None,
    };
    let target = verdict.overrule.or(stands_for);
    if let Spelling::Other(text) = &node.spelling {
        let finding = Finding {
            kind: Kind::UnknownValue,
            was: Was::Other(text.clone()),
            now: target.map_or(Written::Nothing, Written::Value),
            declared: verdict.declared,
        };
        plan.findings.push(finding, Place { list_id: None, at: node.element.start() as u32 });
    }
    if let Some(source) = target {
        plan.claims_contact |= source == Source::Contact;
        if node.spelling != Spelling::Known(source) {
            plan.edits.push(node.set(source));
        }
    }
}

/// Whether what a node means differs from the declaration, if there is one.
fn differs(meaning: Meaning<'_>, verdict: &Verdict) -> bool {
    verdict.declared.is_some_and(|declared| meaning != Meaning::Known(declared))
}

/// A list-level node, wherever it stands: held against the declaration.
fn plan_list(
    document: &Document,
    node: &Node,
    verdict: &Verdict,
    stripped: bool,
    policy: &Policy,
    plan: &mut Plan,
) {
    let meaning = meaning(node, policy);
    let (was, alias) = match (&node.spelling, meaning) {
        (Spelling::Empty, _) => (Was::Empty, None),
        (Spelling::Known(source), _) => (Was::Known(*source), None),
        (Spelling::Other(text), Meaning::Known(source)) => (Was::Other(text.clone()), Some(source)),
        (Spelling::Other(text), _) => (Was::Other(text.clone()), None),
    };
    let differs = differs(meaning, verdict);
    let (kind, now) = match (differs, verdict.declared, alias) {
        (true, Some(declared), _) if policy.lists == Lists::Align => {
            (Kind::ListDiffers, Written::Value(declared))
        }
        (true, ..) if stripped => (Kind::ListDiffers, Written::Removed),
        // An alias leaves as what it stands for, whatever else is left alone.
        (_, _, Some(_)) if stripped => (Kind::UnknownValue, Written::Removed),
        (_, _, Some(source)) => (Kind::UnknownValue, Written::Value(source)),
        (true, ..) => (Kind::ListDiffers, Written::Nothing),
        (false, ..) if matches!(meaning, Meaning::Unknown(_)) => {
            (Kind::UnknownValue, Written::Nothing)
        }
        (false, ..) => return,
    };
    let (start, declared) = (node.element.start() as u32, verdict.declared);
    // Where one list differs, most do: room for a few at once, and then for each node by itself, a tenth of the time.
    let room = match plan.findings.len() {
        0 => document.lists.len().min(FEW),
        1 => document.nodes.len(),
        _ => 0,
    };
    plan.findings.reserve(room);
    let copies = document.occurrences(node);
    let places = copies.clone();
    let places = places.map(|it| Place { list_id: it.list.id, at: start + it.offset });
    plan.findings.extend(Finding { kind, was, now, declared }, places);
    if let Written::Value(source) = now {
        plan.edits.reserve(room);
        plan.edits.extend(node.set(source), copies.map(|it| it.offset));
    }
}

/// Takes all sources and times out of the lists that differ, if that is the setting. Returns, by
/// list, whether it was done.
fn plan_stripping(
    document: &Document,
    verdicts: &[Verdict],
    policy: &Policy,
    plan: &mut Plan,
) -> Vec<bool> {
    if policy.lists != Lists::Strip {
        return Vec::new();
    }
    let mut stripped = vec![false; document.lists.len()];
    for node in &document.nodes {
        let differs = differs(meaning(node, policy), &verdicts[node.contact as usize]);
        document.occurrences(node).for_each(|copy| stripped[copy.number] |= differs);
    }
    let nodes = document.nodes.iter().flat_map(|node| {
        let copies = document.occurrences(node);
        copies.map(|copy| (copy.number, node.element.moved_by(copy.offset)))
    });
    let times = document.times.iter().map(|time| (time.list as usize, time.element));
    for (list, span) in nodes.chain(times) {
        if stripped[list] {
            plan.edits.push(Edit { span, with: With::Text("".into()), bridge: Bridge::None });
        }
    }
    stripped
}
