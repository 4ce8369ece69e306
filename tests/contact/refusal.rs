//! The transition refusal: recognised in all its dress, and judged by what was sent.

use proptest::prelude::*;

use optin_proxy::contact::refusal::{
    DEFAULT_PATTERN, INSPECTED, Pattern, PatternError, Sent, Verdict,
};

const THREAD: &str = "Error 400: Update failed: Existing person 123456:789 has an invalid state: \
    Status transition from O to S is not allowed when action by owner and confirm opt in is off";

const CLAIMED: Sent = Sent { update: true, claims_contact: true };

fn judge(text: &str, sent: Sent) -> Option<Verdict> {
    Pattern::new(DEFAULT_PATTERN).expect("the default compiles").judge(text.as_bytes(), sent)
}

#[test]
fn an_update_that_claimed_the_contact_and_is_refused_as_the_owners_is_transient() {
    assert_eq!(judge(THREAD, CLAIMED), Some(Verdict::Transient));
}

#[test]
fn the_message_is_recognised_in_any_case_white_space_and_dress() {
    for text in [
        THREAD.to_uppercase(),
        THREAD.replace(' ', "\r\n\t "),
        THREAD.replace(' ', "\t"),
        THREAD.replace("from O", "from  O"),
        THREAD.replace(' ', "\u{a0}"),
        format!("<error><message>{THREAD}</message></error>"),
        format!("<html><body><p>{}</p></body></html>", THREAD.replace("opt in", "opt-in")),
        THREAD.replace("opt in is off", "optin is on"),
        THREAD.replace(" and confirm opt in is off", ""),
    ] {
        assert_eq!(judge(&text, CLAIMED), Some(Verdict::Transient), "{text}");
    }
}

#[test]
fn a_refusal_that_is_true_of_what_was_sent_is_legitimate() {
    for sent in
        [Sent { update: true, claims_contact: false }, Sent { update: false, claims_contact: true }]
    {
        assert_eq!(judge(THREAD, sent), Some(Verdict::Legitimate));
    }
    let by_contact = THREAD.replace("owner", "contact");
    assert_eq!(judge(&by_contact, CLAIMED), Some(Verdict::Legitimate));
}

#[test]
fn other_errors_are_no_refusal() {
    for text in ["", "Error 400: EmailAddress is required", "Status transition from O to S"] {
        assert_eq!(judge(text, CLAIMED), None, "{text}");
    }
}

#[test]
fn only_the_first_64_kib_count() {
    let at = |offset: usize| format!("{}{THREAD}", "x".repeat(offset - 1) + " ");
    assert_eq!(judge(&at(INSPECTED - THREAD.len()), CLAIMED), Some(Verdict::Transient));
    assert_eq!(judge(&at(INSPECTED), CLAIMED), None);
}

#[test]
fn a_pattern_of_ones_own_must_name_the_actor() {
    assert!(matches!(Pattern::new("not allowed"), Err(PatternError::NoActor)));
    assert!(matches!(Pattern::new("("), Err(PatternError::Syntax(_))));
    let own = Pattern::new("denied for (?<actor>owner|contact)").expect("it compiles");
    assert_eq!(own.judge(b"DENIED\n for  Owner", CLAIMED), Some(Verdict::Transient));
    assert_eq!(own.judge(b"denied for contact", CLAIMED), Some(Verdict::Legitimate));
}

#[test]
fn white_space_in_a_pattern_is_folded_as_in_the_text() {
    for pattern in [
        "denied  for\tthe\n(?<actor>owner)",
        "(?x) denied \\s for \\s the \\s # a comment\n (?<actor>owner)",
    ] {
        let own = Pattern::new(pattern).expect("it compiles");
        let verdict = own.judge(b"DENIED for   the owner", CLAIMED);
        assert_eq!(verdict, Some(Verdict::Transient), "{pattern}");
    }
}

proptest! {
    /// A text of ASCII is looked at by a pattern that knows no other letters.
    #[test]
    fn a_text_of_ascii_is_judged_as_if_another_sign_stood_before_it(
        pattern in prop::sample::select(vec![
            DEFAULT_PATTERN,
            r"(?<actor>\w+)",
            r"\bby\s(?<actor>[^ ]+)( and|$)",
            r"by (?<actor>\S{2,6}?)\W",
            r"(?-i)by (?<actor>[a-z]*)[[:punct:]]",
            r"(?u)by (?<actor>\D+?) and",
            r"by.(?<actor>\p{L}+).",
            "ac\u{212a}|by (?<actor>o?wner)",
            r"ac\x{212a}|by (?<actor>\u006fwner)",
        ]),
        words in prop::collection::vec(
            prop::sample::select(vec![
                THREAD, "by owner", "BY Owner and", "by OWNER.", "by\tcontact!", "ack", "by", "owner", "(7)", "\u{7f}\u{1f}",
            ]),
            0..6,
        ),
        sent in prop::sample::select(vec![CLAIMED, Sent { update: true, claims_contact: false }]),
    ) {
        let pattern = Pattern::new(pattern).expect("it compiles");
        let text = words.join(" ");
        let other = format!("\u{b7} {text}");
        prop_assert_eq!(pattern.judge(text.as_bytes(), sent), pattern.judge(other.as_bytes(), sent));
    }
}
