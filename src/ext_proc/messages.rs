//! Envoy's messages and the field's own types, one into the other.

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3::header_value_option::HeaderAppendAction;
use envoy_types::pb::envoy::config::core::v3::{
    HeaderMap as Fields, HeaderValue, HeaderValueOption,
};
use envoy_types::pb::envoy::extensions::filters::http::ext_proc::v3::ProcessingMode;
use envoy_types::pb::envoy::extensions::filters::http::ext_proc::v3::processing_mode::BodySendMode;
use envoy_types::pb::envoy::service::ext_proc::v3::body_mutation::Mutation;
use envoy_types::pb::envoy::service::ext_proc::v3::processing_response::Response as Answer;
use envoy_types::pb::envoy::service::ext_proc::v3::{
    BodyMutation, BodyResponse, CommonResponse, HeaderMutation, HeadersResponse, ImmediateResponse,
    ProcessingResponse, ProtocolConfiguration, TrailersResponse,
};
use envoy_types::pb::envoy::r#type::v3::HttpStatus;
use http::header::{CONTENT_LENGTH, HOST};
use http::{HeaderMap, HeaderName, Method, Request, StatusCode, Uri};

use crate::proxy::body::Body;
use crate::proxy::error::Problem;

/// Whether the body is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    None,
    /// Whole: its length is known, and Envoy holds so much.
    Buffered,
    /// As much of it as Envoy holds. Of a body that nobody announced, BUFFERED could be more than that: Envoy would
    /// refuse it, or hang if it comes before the answer to the head.
    BufferedPartial,
}

/// The fields of a head that are looked at. deploy/envoy/ext-proc.yaml lets Envoy send no others (`forward_rules`): what
/// nobody needs, credentials above all, stays there.
const FIELDS: [&str; 14] = [
    ":authority",
    ":method",
    ":path",
    ":status",
    "content-digest",
    "content-encoding",
    "content-length",
    "content-md5",
    "content-type",
    "digest",
    "repr-digest",
    "traceparent",
    "user-agent",
    "x-request-id",
];

/// A field's value: Envoy sends bytes, its older versions text.
fn value(field: &HeaderValue) -> &[u8] {
    if field.raw_value.is_empty() { field.value.as_bytes() } else { &field.raw_value }
}

/// The request that a head is of. What is no HTTP in it Envoy has refused.
pub(super) fn request(fields: Option<&Fields>) -> Request<()> {
    let mut request = Request::new(());
    for field in fields.iter().flat_map(|it| &it.headers) {
        let value = value(field);
        match field.key.as_str() {
            ":method" => {
                if let Ok(method) = Method::from_bytes(value) {
                    *request.method_mut() = method;
                }
            }
            ":path" => {
                if let Ok(uri) = Uri::try_from(value) {
                    *request.uri_mut() = uri;
                }
            }
            name if FIELDS.contains(&name) => {
                let name = if name == ":authority" { Ok(HOST) } else { name.parse::<HeaderName>() };
                if let (Ok(name), Ok(value)) = (name, http::HeaderValue::from_bytes(value)) {
                    request.headers_mut().append(name, value);
                }
            }
            _ => {}
        }
    }
    request
}

/// The status in an answer's head.
pub(super) fn status(fields: Option<&Fields>) -> Option<StatusCode> {
    let status = fields?.headers.iter().find(|field| field.key == ":status")?;
    StatusCode::from_bytes(value(status)).ok()
}

/// Whether the filter sends a body in one message. A mode that the answer to the head asks for is BUFFERED.
pub(super) fn is_whole(configured: &ProtocolConfiguration) -> bool {
    [BodySendMode::None as i32, BodySendMode::Buffered as i32]
        .contains(&configured.request_body_mode)
}

/// Nothing is to be changed.
pub(super) fn go_on<T: Default>(wrap: impl FnOnce(T) -> Answer) -> ProcessingResponse {
    ProcessingResponse { response: Some(wrap(T::default())), ..ProcessingResponse::default() }
}

pub(super) fn trailers(wrap: impl FnOnce(TrailersResponse) -> Answer) -> ProcessingResponse {
    go_on(wrap)
}

/// The answer to a request's head.
pub(super) fn head(mode: Mode) -> ProcessingResponse {
    let body = match mode {
        Mode::None => BodySendMode::None,
        Mode::Buffered => BodySendMode::Buffered,
        Mode::BufferedPartial => BodySendMode::BufferedPartial,
    };
    let mode = ProcessingMode { request_body_mode: body as i32, ..ProcessingMode::default() };
    ProcessingResponse {
        mode_override: Some(mode),
        response: Some(Answer::RequestHeaders(HeadersResponse::default())),
        ..ProcessingResponse::default()
    }
}

fn set(name: &HeaderName, value: Vec<u8>) -> HeaderValueOption {
    let (key, raw_value) = (name.to_string(), value);
    HeaderValueOption {
        header: Some(HeaderValue { key, raw_value, ..HeaderValue::default() }),
        append_action: HeaderAppendAction::OverwriteIfExistsOrAdd as i32,
        ..HeaderValueOption::default()
    }
}

/// The body to send in the place of the client's.
pub(super) fn body(edited: Bytes, is_counted: bool, gone: Vec<String>) -> ProcessingResponse {
    let length = edited.len().to_string().into_bytes();
    let response = CommonResponse {
        header_mutation: Some(HeaderMutation {
            set_headers: is_counted.then(|| set(&CONTENT_LENGTH, length)).into_iter().collect(),
            remove_headers: gone,
        }),
        // Not `into`: that moves it onto itself, which musl does backwards, byte by byte.
        body_mutation: Some(BodyMutation { mutation: Some(Mutation::Body(edited.to_vec())) }),
        ..CommonResponse::default()
    };
    let body = BodyResponse { response: Some(response) };
    ProcessingResponse {
        response: Some(Answer::RequestBody(body)),
        ..ProcessingResponse::default()
    }
}

const REPORT: HeaderName = HeaderName::from_static("optin-proxy");

/// The answer to an answer's head.
pub(super) fn report(report: Option<http::HeaderValue>) -> ProcessingResponse {
    let mutation = match report {
        Some(report) => HeaderMutation {
            set_headers: vec![set(&REPORT, report.as_bytes().to_vec())],
            remove_headers: Vec::new(),
        },
        // Nobody else's report is taken for ours.
        None => {
            HeaderMutation { set_headers: Vec::new(), remove_headers: vec![REPORT.to_string()] }
        }
    };
    let response = CommonResponse { header_mutation: Some(mutation), ..CommonResponse::default() };
    let head = HeadersResponse { response: Some(response) };
    ProcessingResponse {
        response: Some(Answer::ResponseHeaders(head)),
        ..ProcessingResponse::default()
    }
}

/// A problem in the place of the upstream's answer.
pub(super) fn refusal(problem: Problem, report: Option<http::HeaderValue>) -> ProcessingResponse {
    let details = format!("optin_proxy_{}", problem.name);
    let (mut parts, body) = problem.into_response().into_parts();
    parts.headers.extend(report.map(|report| (REPORT, report)));
    let fields = |headers: &HeaderMap| {
        headers.iter().map(|(name, value)| set(name, value.as_bytes().to_vec())).collect()
    };
    let refusal = ImmediateResponse {
        status: Some(HttpStatus { code: i32::from(parts.status.as_u16()) }),
        headers: Some(HeaderMutation {
            set_headers: fields(&parts.headers),
            remove_headers: vec![],
        }),
        body: match body {
            Body::Buffered(body) => body.into(),
            _ => Vec::new(),
        },
        details,
        ..ImmediateResponse::default()
    };
    ProcessingResponse {
        response: Some(Answer::ImmediateResponse(refusal)),
        ..ProcessingResponse::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::sanitize::DIGESTS;

    #[test]
    fn envoy_is_told_to_send_the_fields_that_are_looked_at_and_no_others() {
        let file = include_str!("../../deploy/envoy/ext-proc.yaml");
        let sent: Vec<_> =
            file.lines().filter_map(|it| it.trim().strip_prefix("- exact: ")).collect();
        let sent: Vec<_> = sent.iter().map(|name| name.trim_matches('"')).collect();
        assert_eq!(sent, FIELDS);
    }

    #[test]
    fn digests_are_among_the_fields_that_are_looked_at() {
        assert!(DIGESTS.iter().all(|digest| FIELDS.contains(&digest.as_str())));
    }
}
