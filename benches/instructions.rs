//! What the rewrite costs in instructions: a program for `valgrind --tool=callgrind`, which counts them.
//!
//! `benches/instructions/run` runs it and holds the counts against the table beside it. Times differ with the
//! machine and with what else it does; instructions of the same code by the same compiler do not.
#![allow(missing_docs, clippy::print_stdout, reason = "a program for people")]

use std::hint::black_box;

use bytes::Bytes;
use optin_proxy::contact::{Policy, Request, Sanitized, sanitize};

const ROUNDS: usize = 50;

fn update(lists: usize, listed: &str) -> Bytes {
    let recipe = include_str!("../tests/corpus/in/recipe.xml");
    let (start, end) = recipe.split_once("</ContactLists>").expect("lists");
    let list = |number| {
        format!(
            "<ContactList id=\"http://api.constantcontact.com/ws/customers/oakmill/lists/{number}\">\
             <OptInSource>ACTION_BY_CUSTOMER</OptInSource></ContactList>\n"
        )
    };
    let more: String = (21..19 + lists).map(list).collect();
    let body = [start, &more, "</ContactLists>", end].concat();
    body.replace("ACTION_BY_CUSTOMER", listed).into()
}

/// As many elements that would be lists in the contact's namespace, and are in one whose name is as long as they are: to look at
/// all of it for each of them would take seconds.
fn foreign(lists: usize) -> Bytes {
    let elements = "<x:ContactList/>".repeat(lists);
    let name = "&amp;".repeat(elements.len() / "&amp;".len());
    let recipe = include_str!("../tests/corpus/in/recipe.xml");
    recipe
        .replace("</ContactLists>", &format!("<x xmlns:x=\"{name}\">{elements}</x></ContactLists>"))
        .into()
}

/// What is counted: this function and what it calls.
#[inline(never)]
fn measured(body: &Bytes, policy: &Policy) -> usize {
    let request = Request { update: true, own_host: Some("127.0.0.1:8080"), charset: None };
    match sanitize(black_box(body), &request, policy) {
        Sanitized::Contact(contact) => black_box(contact.body.len()),
        other => unreachable!("{other:?}"),
    }
}

fn main() {
    let Some(case) = std::env::args().find(|argument| argument.contains("lists")) else { return };
    let (lists, kind) = case.split_once("-lists-").expect("NUMBER-lists-KIND");
    let lists = lists.parse().expect("a number");
    let listed = if kind == "edited" { "ACTION_BY_CUSTOMER" } else { "ACTION_BY_CONTACT" };
    let body = if kind == "foreign" { foreign(lists) } else { update(lists, listed) };
    let policy = Policy::default();
    // Whatever is set up once is set up by the first.
    measured(&body, &policy);
    for _ in 0..ROUNDS {
        measured(&body, &policy);
    }
    println!("{} {}", body.len(), ROUNDS + 1);
}
