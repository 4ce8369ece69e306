//! What the log says of an exchange that is over: an event for each finding, and the one line.
//!
//! A line of JSON takes some 2 us, so an update with eight findings would take longer to log than to serve. The journal's
//! thread does it, as long as it keeps up.

use tracing::Level;
use tracing::field::display;

use super::clocks::Clocks;
use super::finished::Finished;
use super::json::WHOLE;
use super::record::{Outcome, Printed, Record};
use super::redact::{Now, Value};

/// Whether anything is logged at all: mismatches are warnings.
pub(super) fn are_wanted() -> bool {
    tracing::enabled!(Level::WARN)
}

/// Logs it where the request was served, which waits for nothing.
pub(super) fn log_at_once(finished: &Finished) {
    log(finished, &Record::new(finished, 0, Clocks::read(), &mut Printed::default()), || {});
}

/// Logs it, each line once `room` has been made for it. `record` is the same in words, whether all its findings are or not.
pub(super) fn log(finished: &Finished, record: &Record, room: impl Fn()) {
    let request_id = display(&record.request_id);
    let account = record.account.as_deref().map(display);
    let contact_id = record.contact_id.as_deref().map(display);
    let user_agent = record.user_agent.as_deref();
    for (finding, list_id) in finished.found.each() {
        room();
        tracing::warn!(
            name: WHOLE,
            kind = finding.kind.as_str(),
            request_id,
            account,
            contact_id,
            list_id = list_id.map(display),
            was = %Value(&finding.was),
            now = %Now(finding),
            user_agent,
            "mismatch"
        );
    }
    room();
    tracing::info!(
        request_id,
        trace_id = record.trace_id.as_deref().map(display),
        method = record.method,
        route = record.route,
        account,
        contact_id,
        // Not `target`, which is a key of every event.
        authority = record.authority.as_deref().map(display),
        decision = record.decision,
        status = record.status,
        outcome = record.outcome.map(Outcome::as_str),
        findings = finished.is_write().then_some(record.found),
        rewritten = finished.is_write().then_some(record.rewritten),
        reason = record.reason,
        attempts = record.attempts,
        problem = record.problem,
        client_gone = (record.status.is_none() && !finished.is_cut).then_some(true),
        cut = finished.is_cut.then_some(true),
        sent = finished.sent,
        complete = record.complete,
        duration_ms = record.duration_ms,
        user_agent,
        "request"
    );
}
