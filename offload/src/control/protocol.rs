//! Requests and responses, as values and as lines.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Longest request line in bytes, without its newline.
pub const MAX_LINE: usize = 64 * 1024;

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Request<'a> {
    #[serde(borrow)]
    pub(super) method: Cow<'a, str>,
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub(super) params: Value,
}

/// What it gets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Response {
    Ok(Value),
    Error(ControlError),
}

/// Kinds of refusal that a program can act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControlErrorKind {
    /// The line is no request, or too long.
    BadRequest,
    /// There is no such method.
    UnknownMethod,
    /// The method does not take these parameters.
    BadParams,
    /// This client may not talk here.
    Refused,
    /// Too many clients; try again later.
    Busy,
    /// The method was understood and failed.
    Failed,
    /// A kind that a newer server knows.
    #[serde(other)]
    Other,
}

/// Why a request was not fulfilled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ControlError {
    /// For programs.
    pub kind: ControlErrorKind,
    /// For people: what is wrong and what to do.
    pub message: String,
}

impl ControlError {
    /// An error of any kind.
    pub fn new(kind: ControlErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    /// The parameters are wrong.
    pub fn bad_params(message: impl Into<String>) -> Self {
        Self::new(ControlErrorKind::BadParams, message)
    }

    /// The method failed.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(ControlErrorKind::Failed, message)
    }
}

impl From<Result<Value, ControlError>> for Response {
    fn from(result: Result<Value, ControlError>) -> Self {
        match result {
            Ok(value) => Self::Ok(value),
            Err(error) => Self::Error(error),
        }
    }
}

impl Response {
    /// The line, with its newline.
    pub(super) fn to_line(&self) -> Vec<u8> {
        // Values and strings always serialise: no maps with other keys, no failing impl.
        let mut line = serde_json::to_vec(self).unwrap_or_else(|_| b"null".to_vec());
        line.push(b'\n');
        line
    }
}

/// Reads a request line.
pub(super) fn parse_request(line: &[u8]) -> Result<Request<'_>, ControlError> {
    serde_json::from_slice(line).map_err(|error| {
        ControlError::new(
            ControlErrorKind::BadRequest,
            format!("not a request like {{\"method\":\"stats\",\"params\":{{}}}}: {error}"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn requests_are_read_and_what_is_none_is_refused() {
        let request = parse_request(br#"{"method":"st\u0061ts","params":[1]}"#).unwrap();
        assert_eq!(
            (request.method.as_ref(), request.params),
            ("stats", json!([1]))
        );
        assert_eq!(
            parse_request(br#"{"method":"x"}"#).unwrap().params,
            Value::Null
        );
        let nested = "[".repeat(MAX_LINE);
        for wrong in [
            "",
            "{",
            "[]",
            "{}",
            r#"{"method":1}"#,
            r#"{"method":"x","parms":1}"#,
            "\u{0}",
            &nested,
        ] {
            let error = parse_request(wrong.as_bytes()).unwrap_err();
            assert_eq!(error.kind, ControlErrorKind::BadRequest, "{wrong:.20}");
        }
        assert!(parse_request(b"{\"method\":\"\xff\"}").is_err());
    }

    #[test]
    fn responses_have_the_form_that_clients_read() {
        assert_eq!(
            Response::Ok(json!({"a": 1})).to_line(),
            b"{\"ok\":{\"a\":1}}\n"
        );
        assert_eq!(
            Response::from(Err(ControlError::bad_params("no\nway"))).to_line(),
            b"{\"error\":{\"kind\":\"bad_params\",\"message\":\"no\\nway\"}}\n"
        );
        let newer = br#"{"error":{"kind":"on_fire","message":"m"}}"#;
        let Response::Error(error) = serde_json::from_slice(newer).unwrap() else {
            panic!()
        };
        assert_eq!(error.kind, ControlErrorKind::Other);
    }
}
