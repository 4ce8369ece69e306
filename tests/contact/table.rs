//! SPEC section 1's table, a row after the other, each with all its settings.

use optin_proxy::contact::Kind::{self, ListDiffers, UnknownValue};
use optin_proxy::contact::{
    Ambiguous, Lists, Mode, Policy, Removal, Request, Sanitized, Source, Undeclared, Uninspectable,
    sanitize,
};

use super::{C, CREATE, U, UPDATE, entry, inspected, kinds, text};

fn with(change: impl FnOnce(&mut Policy)) -> Policy {
    let mut policy = Policy::default();
    change(&mut policy);
    policy
}

/// What comes out of an entry under a policy, and the findings.
fn run(declared: &[&str], lists: &[Option<&str>], policy: &Policy) -> (String, Vec<(Kind, bool)>) {
    let contact = inspected(&entry(declared, lists), &UPDATE, policy);
    (text(&contact), kinds(&contact))
}

#[test]
fn list_differs_is_aligned_by_default() {
    for other in ["", U, "ACTION_BY_SYSTEM", " \n "] {
        let (out, found) = run(&[C], &[Some(other), Some(C), None], &Policy::default());
        let kept: String = other.chars().filter(|char| char.is_whitespace()).collect();
        let aligned = format!("{C}{kept}");
        assert_eq!(out, entry(&[C], &[Some(&aligned), Some(C), None]), "{other:?}");
        assert_eq!(found, [(ListDiffers, true)], "{other:?}");
    }
}

#[test]
fn list_differs_can_be_stripped_with_its_time() {
    let policy = with(|policy| policy.lists = Lists::Strip);
    let time = "<OptInTime>2010-01-01T00:00:00Z</OptInTime>";
    let source = format!("<OptInSource>{U}</OptInSource>");
    let body = entry(&[C], &[Some(U), Some(C), None]);
    let body = body.replace(&source, &format!("{source} {time}"));
    let contact = inspected(&body, &UPDATE, &policy);
    assert_eq!(kinds(&contact), [(ListDiffers, true)]);
    assert_eq!(text(&contact), body.replace(&source, "").replace(time, ""));
}

#[test]
fn a_stripped_list_loses_all_its_sources_known_as_another_or_not() {
    let policy = with(|policy| {
        policy.lists = Lists::Strip;
        policy.aliases.insert("ALIAS".into(), Source::Contact);
    });
    let two = format!("{U}</OptInSource><OptInSource>ALIAS");
    let (out, found) = run(&[C], &[Some(&two)], &policy);
    assert_eq!(out, entry(&[C], &[None]));
    assert_eq!(found, [(ListDiffers, true), (UnknownValue, true)]);
}

#[test]
fn list_differs_can_be_left() {
    let policy = with(|policy| policy.lists = Lists::Leave);
    let (out, found) = run(&[C], &[Some(U)], &policy);
    assert_eq!(out, entry(&[C], &[Some(U)]));
    assert_eq!(found, [(ListDiffers, false)]);
}

#[test]
fn undeclared_is_left_by_default() {
    for declared in [&[][..], &[""], &[" \t\r\n"], &["", ""]] {
        let (out, found) = run(declared, &[Some(C), Some("")], &Policy::default());
        assert_eq!(out, entry(declared, &[Some(C), Some("")]));
        assert_eq!(found[0], (Kind::Undeclared, false));
    }
}

#[test]
fn undeclared_can_be_filled_from_lists_that_agree() {
    let policy = with(|policy| policy.undeclared = Undeclared::FromLists);
    let (out, found) = run(&[], &[Some(C), Some(C)], &policy);
    assert!(out.contains(&format!(
        "<Contact xmlns=\"http://ws.constantcontact.com/ns/1.0/\"><OptInSource>{C}</OptInSource><EmailAddress>"
    )));
    assert_eq!(found, [(Kind::Undeclared, true)]);
    let (out, _) = run(&[""], &[Some(U), Some(U)], &policy);
    assert_eq!(out, entry(&[U], &[Some(U), Some(U)]));
}

#[test]
fn undeclared_is_not_filled_from_lists_that_disagree_or_are_silent() {
    let policy = with(|policy| policy.undeclared = Undeclared::FromLists);
    for lists in [
        &[Some(C), None][..],
        &[Some(C), Some(U)],
        &[Some(C), Some("")],
        &[Some(C), Some("X")],
        &[],
    ] {
        let (out, found) = run(&[], lists, &policy);
        assert_eq!(out, entry(&[], lists), "{lists:?}");
        assert_eq!(found[0], (Kind::Undeclared, false), "{lists:?}");
    }
}

#[test]
fn undeclared_can_be_filled_with_either_value_and_the_lists_follow() {
    for (setting, value) in [(Undeclared::Customer, U), (Undeclared::Contact, C)] {
        let policy = with(|policy| policy.undeclared = setting);
        let (out, found) = run(&[""], &[Some(C), Some(U)], &policy);
        assert_eq!(out, entry(&[value], &[Some(value), Some(value)]));
        let all = [(Kind::Undeclared, true), (Kind::ListsDisagree, true), (ListDiffers, true)];
        assert_eq!(found, all);
    }
}

#[test]
fn a_declaration_is_inserted_under_the_contacts_own_prefix() {
    let policy = with(|policy| policy.undeclared = Undeclared::Customer);
    let ns = "xmlns:c=\"http://ws.constantcontact.com/ns/1.0/\"";
    for (body, out) in [
        (
            format!("<c:Contact {ns}> <c:Note/></c:Contact>"),
            format!("<c:Contact {ns}><c:OptInSource>{U}</c:OptInSource> <c:Note/></c:Contact>"),
        ),
        (
            format!("<c:Contact {ns} />"),
            format!("<c:Contact {ns} ><c:OptInSource>{U}</c:OptInSource></c:Contact>"),
        ),
    ] {
        assert_eq!(text(&inspected(&body, &UPDATE, &policy)), out);
    }
}

#[test]
fn ambiguous_is_left_by_default_and_its_lists_with_it() {
    for declared in [&[C, U][..], &[U, C], &[C, ""], &["", U, U]] {
        let (out, found) = run(declared, &[Some(C), Some(U)], &Policy::default());
        assert_eq!(out, entry(declared, &[Some(C), Some(U)]));
        assert_eq!(found, [(Kind::Ambiguous, false)]);
    }
}

#[test]
fn ambiguous_can_be_settled_and_the_lists_follow() {
    for (setting, value) in [
        (Ambiguous::First, C),
        (Ambiguous::Last, U),
        (Ambiguous::Customer, U),
        (Ambiguous::Contact, C),
    ] {
        let policy = with(|policy| policy.ambiguous = setting);
        let (out, found) = run(&[C, "", U], &[Some("")], &policy);
        assert_eq!(out, entry(&[value, value, value], &[Some(value)]), "{setting:?}");
        assert_eq!(found, [(Kind::Ambiguous, true), (ListDiffers, true)], "{setting:?}");
    }
}

#[test]
fn ambiguous_is_not_settled_by_a_value_that_nobody_knows() {
    for (setting, declared) in [(Ambiguous::First, ["X", C]), (Ambiguous::Last, [C, "X"])] {
        let policy = with(|policy| policy.ambiguous = setting);
        let (out, found) = run(&declared, &[None], &policy);
        assert_eq!(out, entry(&declared, &[None]));
        assert_eq!(found, [(Kind::Ambiguous, false), (UnknownValue, false)], "{setting:?}");
    }
}

#[test]
fn lists_that_disagree_are_reported_beside_undeclared_only() {
    let (_, found) = run(&[], &[Some(C), Some(U), None], &Policy::default());
    assert_eq!(found, [(Kind::Undeclared, false), (Kind::ListsDisagree, false)]);
    let (_, found) = run(&[], &[Some(C), Some(C), None], &Policy::default());
    assert_eq!(found, [(Kind::Undeclared, false)]);
}

#[test]
fn a_removal_by_the_contact_becomes_the_owners() {
    let (out, found) = run(&[C, C], &[], &Policy::default());
    assert_eq!(out, entry(&[U, U], &[]));
    assert_eq!(found, [(Kind::RemovalByContact, true)]);
}

#[test]
fn a_removal_by_the_contact_can_be_left() {
    let policy = with(|policy| policy.removal = Removal::Leave);
    let (out, found) = run(&[C], &[], &policy);
    assert_eq!(out, entry(&[C], &[]));
    assert_eq!(found, [(Kind::RemovalByContact, false)]);
}

#[test]
fn a_create_without_lists_and_a_removal_by_the_owner_are_no_findings() {
    let contact = inspected(&entry(&[C], &[]), &CREATE, &Policy::default());
    assert!(contact.findings.is_empty());
    assert!(run(&[U], &[], &Policy::default()).1.is_empty());
}

#[test]
fn a_list_anywhere_in_a_contact_makes_it_no_removal() {
    let body = entry(&[C], &[]).replace("<ContactLists></ContactLists>", "<ContactList id='1'/>");
    let contact = inspected(&body, &UPDATE, &Policy::default());
    assert_eq!((kinds(&contact), text(&contact)), (vec![], body));
}

#[test]
fn no_setting_that_fills_in_a_declaration_makes_a_removal_the_contacts() {
    for (declared, policy) in [
        (&[][..], with(|policy| policy.undeclared = Undeclared::Contact)),
        (&[""], with(|policy| policy.undeclared = Undeclared::Contact)),
        (&[C, U], with(|policy| policy.ambiguous = Ambiguous::Contact)),
        (&[C, U], with(|policy| policy.ambiguous = Ambiguous::First)),
        (
            &["ALIAS"],
            with(|policy| {
                policy.aliases.insert("ALIAS".into(), Source::Contact);
            }),
        ),
    ] {
        let (out, _) = run(declared, &[], &policy);
        assert!(!out.contains(C) && out.contains(U), "{declared:?}: {out}");
        let mut leaving = policy.clone();
        leaving.removal = Removal::Leave;
        assert!(run(declared, &[], &leaving).0.contains(C), "{declared:?}");
    }
}

#[test]
fn an_unknown_declaration_is_left_and_declares_nothing() {
    for value in ["ACTION_BY_CLIENT", "action_by_contact", "ACTION_BY_CONTACT x"] {
        let (out, found) = run(&[value], &[Some(U), Some(C)], &Policy::default());
        assert_eq!(out, entry(&[value], &[Some(U), Some(C)]));
        assert_eq!(found, [(UnknownValue, false)]);
    }
}

#[test]
fn an_unknown_list_value_counts_under_one_kind_only() {
    let (_, found) = run(&[C], &[Some("X")], &Policy::default());
    assert_eq!(found, [(ListDiffers, true)]);
    let (_, found) = run(&[], &[Some("X"), Some(C)], &Policy::default());
    assert_eq!(found, [(Kind::Undeclared, false), (UnknownValue, false)]);
}

#[test]
fn an_alias_is_known_and_leaves_as_what_it_stands_for() {
    let policy = with(|policy| {
        policy.aliases.insert("ACTION_BY_CLIENT".into(), Source::Contact);
    });
    let (out, found) = run(&["ACTION_BY_CLIENT"], &[Some(U), Some("ACTION_BY_CLIENT")], &policy);
    assert_eq!(out, entry(&[C], &[Some(C), Some(C)]));
    assert_eq!(found, [(UnknownValue, true), (ListDiffers, true), (UnknownValue, true)]);
    let (_, found) = run(&["action_by_client"], &[], &policy);
    assert_eq!(found, [(UnknownValue, false)], "aliases are case-sensitive");
    let (out, found) = run(&[C, "ACTION_BY_CLIENT"], &[None], &policy);
    assert_eq!(out, entry(&[C, C], &[None]), "they do not contradict each other");
    assert_eq!(found, [(UnknownValue, true)]);
    let policy = Policy { lists: Lists::Leave, ..policy };
    let (out, found) = run(&[U], &[Some("ACTION_BY_CLIENT")], &policy);
    assert_eq!(out, entry(&[U], &[Some(C)]), "though it differs, and is left so");
    assert_eq!(found, [(UnknownValue, true)]);
}

#[test]
fn ids_under_the_proxys_own_origin_get_the_apis_back() {
    let body = |origin: &str| {
        format!(
            "<entry xmlns=\"http://www.w3.org/2005/Atom\"><id> {origin}/x </id><link id=\"{origin}\" href=\"{origin}/y\"/>\
             <Contact xmlns=\"http://ws.constantcontact.com/ns/1.0/\" id='{origin}/z'>\
             <Note>{origin}/n</Note><OptInSource>{U}</OptInSource>\
             <ContactLists><ContactList id=\"{origin}.example/1\"/></ContactLists></Contact></entry>"
        )
    };
    let request = Request { own_host: Some("proxy.local:81"), ..UPDATE };
    for scheme in ["http", "https"] {
        let own = body(&format!("{scheme}://proxy.local:81"));
        let contact = inspected(&own, &request, &Policy::default());
        assert_eq!(kinds(&contact), [(Kind::OwnOrigin, true); 3]);
        let api = "http://api.constantcontact.com";
        let restored = own
            .replace(&format!("<id> {scheme}://proxy.local:81/x"), &format!("<id> {api}/x"))
            .replace(
                &format!("<link id=\"{scheme}://proxy.local:81\""),
                &format!("<link id=\"{api}\""),
            )
            .replace(&format!("id='{scheme}://proxy.local:81/z'"), &format!("id='{api}/z'"));
        assert_eq!(text(&contact), restored);
        let policy = with(|policy| policy.keep_own_ids = true);
        let left = inspected(&own, &request, &policy);
        assert_eq!(kinds(&left), [(Kind::OwnOrigin, false); 3]);
        assert_eq!(text(&left), own);
        assert!(inspected(&own, &UPDATE, &Policy::default()).findings.is_empty());
    }
}

#[test]
fn an_id_under_another_port_or_a_longer_name_is_under_another_origin() {
    let ids = "<id>http://proxy.local:9999/x</id><id>http://proxy.local.x/</id><EmailAddress>";
    let body = entry(&[U], &[]).replace("<EmailAddress>", ids);
    let request = Request { own_host: Some("proxy.local"), ..UPDATE };
    assert_eq!(kinds(&inspected(&body, &request, &Policy::default())), []);
}

#[test]
fn the_apis_own_ids_are_no_finding_where_the_client_used_the_apis_name() {
    let body = entry(&[U], &[])
        .replace("<EmailAddress>", "<id>http://api.constantcontact.com/ws</id><EmailAddress>");
    // Regression: in other letters it was one, again and again, whose edit changed nothing.
    for name in ["api.constantcontact.com", "API.ConstantContact.com"] {
        let request = Request { own_host: Some(name), ..UPDATE };
        assert!(inspected(&body, &request, &Policy::default()).findings.is_empty(), "{name}");
    }
}

#[test]
fn observing_reports_all_and_changes_nothing() {
    let policy = with(|policy| policy.mode = Mode::Observe);
    let body = entry(&[C], &[Some(U)]);
    let contact = inspected(&body, &UPDATE, &policy);
    assert_eq!(kinds(&contact), [(ListDiffers, false)]);
    assert_eq!(text(&contact), body);
    assert!(contact.claims_contact, "the retry works");
}

#[test]
fn what_is_sent_is_known_to_claim_the_contact() {
    let claims = |declared: &[&str], policy: &Policy| {
        inspected(&entry(declared, &[Some(U)]), &UPDATE, policy).claims_contact
    };
    let policy = Policy::default();
    assert!(claims(&[C], &policy));
    assert!(claims(&[U, C], &policy), "one of the contradictory ones");
    assert!(!claims(&[U], &policy));
    assert!(!claims(&[], &policy));
    assert!(!claims(&["X"], &policy));
    let removal = inspected(&entry(&[C], &[]), &UPDATE, &policy);
    assert!(!removal.claims_contact, "it left as the owner's");
    let observing = with(|policy| {
        policy.mode = Mode::Observe;
        policy.aliases.insert("ALIAS".into(), Source::Contact);
    });
    let removal = |declared| inspected(&entry(&[declared], &[]), &UPDATE, &observing);
    assert!(removal(C).claims_contact, "it left as it was");
    assert!(!removal("ALIAS").claims_contact, "the API does not know it");
}

#[test]
fn depth_is_inspected_up_to_256_levels() {
    let nested = |levels: usize| {
        let contact = entry(&[C], &[Some(U)]);
        // The entry itself is six levels deep.
        let around = levels - 6;
        format!("{}{contact}{}", "<a>".repeat(around), "</a>".repeat(around))
    };
    let contact = inspected(&nested(256), &UPDATE, &Policy::default());
    assert_eq!(contact.findings.len(), 1);
    for levels in [257, 100_000] {
        let sanitized = sanitize(&nested(levels).into(), &UPDATE, &Policy::default());
        assert!(matches!(sanitized, Sanitized::Uninspectable(Uninspectable::Depth)), "{levels}");
    }
}

/// Regression: an id in a tag that is removed as a whole was restored as well.
#[test]
fn a_stripped_node_may_carry_an_id() {
    let policy = with(|policy| policy.lists = Lists::Strip);
    let body = entry(&[C], &[Some(U)])
        .replace(&format!("<OptInSource>{U}</OptInSource>"), &format!("<OptInSource id=\"http://own/1\">{U}</OptInSource><OptInTime id='http://own/2'>x</OptInTime>"));
    let request = Request { own_host: Some("own"), ..UPDATE };
    let contact = inspected(&body, &request, &policy);
    assert_eq!(text(&contact), entry(&[C], &[None]));
}

/// Regression: white space in it was taken off, as of a value.
#[test]
fn a_namespace_whose_name_ends_in_white_space_is_another_one() {
    let foreign = format!(
        "<x:OptInSource xmlns:x='http://ws.constantcontact.com/ns/1.0/&#32;'>{C}</x:OptInSource>"
    );
    let ours = foreign.replace("/&#32;", "&#x2F;");
    for (node, expected) in [(foreign, Kind::Undeclared), (ours, ListDiffers)] {
        let body = entry(&[], &[Some(U)]).replace("<ContactLists>", &(node + "<ContactLists>"));
        let contact = inspected(&body, &UPDATE, &Policy::default());
        assert_eq!(kinds(&contact)[0].0, expected, "{body}");
    }
}

/// Regression: an edit inside an element that another edit replaces as a whole cannot be spliced.
#[test]
fn nothing_is_looked_for_inside_a_value() {
    let inner = entry(&[C], &[Some(U)]);
    let (out, found) = run(&[C], &[Some(&inner)], &Policy::default());
    assert_eq!(out, entry(&[C], &[Some(C)]));
    assert_eq!(found, [(ListDiffers, true)]);
    let id = "<id>http://own/1</id>";
    let request = Request { own_host: Some("own"), ..UPDATE };
    let contact = inspected(&entry(&[C], &[Some(id)]), &request, &Policy::default());
    assert_eq!(text(&contact), entry(&[C], &[Some(C)]));
}

/// Regression: with its own slash left before it, an element that an edit opened closed at once.
#[test]
fn a_tag_with_two_slashes_at_its_end_is_none() {
    for body in [
        entry(&[C], &[Some(U)])
            .replace(&format!("<OptInSource>{U}</OptInSource>"), "<OptInSource//>"),
        entry(&[], &[])
            .replace("<ContactLists></ContactLists>", "")
            .replace("></Contact>", " a=//>"),
    ] {
        assert!(body.contains("//>"), "{body}");
        let sanitized = sanitize(&body.clone().into(), &UPDATE, &Policy::default());
        assert!(
            matches!(sanitized, Sanitized::Uninspectable(Uninspectable::Malformed)),
            "{body}: {sanitized:?}"
        );
    }
}
