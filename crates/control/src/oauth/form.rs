//! A request of a client: the parameters of a form, each once. What is not clear is refused, so that nobody reads something else in it
//! than we do.

use std::{collections::BTreeMap, time::Duration};

use axum::body::Body;
use http::{HeaderMap, header};

use super::{Refused, Word, refused};
use crate::site::guard::text;

/// Longest form, in bytes: an assertion and a token, and what goes with them.
const FORM_BYTES_MAX: usize = 64 * 1024;
/// Parameters of one form.
const PARAMETERS_MAX: usize = 32;
/// How long a form may take.
const FORM_WITHIN: Duration = Duration::from_secs(10);

/// The parameters of a request.
#[derive(Debug, PartialEq, Eq)]
pub struct Form(BTreeMap<String, String>);

impl Form {
    /// Reads the body of a request.
    pub async fn read(headers: &HeaderMap, body: Body) -> Result<Self, Refused> {
        let kind = text(headers, header::CONTENT_TYPE).and_then(|kind| kind.split(';').next()).unwrap_or_default();
        if !kind.trim().eq_ignore_ascii_case("application/x-www-form-urlencoded") {
            return Err(refused(Word::InvalidRequest, "the body has to be application/x-www-form-urlencoded"));
        }
        let declared = text(headers, header::CONTENT_LENGTH).and_then(|length| length.parse::<usize>().ok());
        let too_long = || refused(Word::TooLong, format!("a form has at most {FORM_BYTES_MAX} bytes"));
        if declared.is_some_and(|length| length > FORM_BYTES_MAX) {
            return Err(too_long());
        }
        match tokio::time::timeout(FORM_WITHIN, axum::body::to_bytes(body, FORM_BYTES_MAX)).await {
            Err(_) => Err(refused(Word::InvalidRequest, "the form did not come in time")),
            Ok(Err(_)) => Err(too_long()),
            Ok(Ok(bytes)) => Self::parse(&bytes),
        }
    }

    /// "Parameters sent without a value MUST be treated as if they were omitted … Request and response parameters MUST NOT be included
    /// more than once" (RFC 6749, 3.2).
    fn parse(bytes: &[u8]) -> Result<Self, Refused> {
        let wrong = |why: &str| refused(Word::InvalidRequest, why);
        let body = std::str::from_utf8(bytes).map_err(|_| wrong("the form is no text"))?;
        let mut parameters = BTreeMap::new();
        for pair in body.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let read = |part: &str| decoded(part).ok_or_else(|| wrong("the form is not encoded as forms are"));
            let (name, value) = (read(name)?, read(value)?);
            if parameters.len() >= PARAMETERS_MAX {
                return Err(wrong("the form has too many parameters"));
            }
            if parameters.insert(name.clone(), value).is_some() {
                let why = format!("`{}` stands there twice", name.chars().take(40).collect::<String>());
                return Err(refused(Word::InvalidRequest, why));
            }
        }
        parameters.retain(|_, value| !value.is_empty());
        Ok(Self(parameters))
    }

    /// A parameter, if it is there and not empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// A parameter that has to be there.
    pub fn demand(&self, name: &str) -> Result<&str, Refused> {
        self.get(name).ok_or_else(|| refused(Word::InvalidRequest, format!("`{name}` is missing")))
    }
}

/// Text as a form encodes it; `None` for what no form says.
fn decoded(part: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(part.len());
    let mut rest = part.as_bytes().iter();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digit = |digit: Option<&u8>| digit.and_then(|digit| char::from(*digit).to_digit(16));
                let (high, low) = (digit(rest.next())?, digit(rest.next())?);
                u8::try_from(high * 16 + low).ok()?
            }
            other => *other,
        });
    }
    String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_says_each_thing_once_and_clearly_or_is_refused() {
        let many = (0..=PARAMETERS_MAX).map(|n| format!("p{n}=1")).collect::<Vec<_>>().join("&");
        for (given, expected) in [
            ("a=1&b=two+words&c=%2F%c3%a9", Ok(vec![("a", "1"), ("b", "two words"), ("c", "/é")])),
            ("", Ok(vec![])),
            ("a=&b=1", Ok(vec![("b", "1")])),
            ("a=1&a=1", Err("stands there twice")),
            ("a=&a=1", Err("stands there twice")),
            ("%61=1&a=1", Err("stands there twice")),
            ("a=%", Err("not encoded")),
            ("a=%4", Err("not encoded")),
            ("a=%zz", Err("not encoded")),
            ("a=%ff", Err("not encoded")),
            ("a=%00", Err("not encoded")),
            (&*many, Err("too many")),
        ] {
            let found = Form::parse(given.as_bytes());
            match expected {
                Ok(pairs) => {
                    let pairs = pairs.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
                    assert_eq!(found, Ok(Form(pairs)), "{given}");
                }
                Err(why) => assert!(found.as_ref().is_err_and(|found| found.why.contains(why)), "{given}: {found:?}"),
            }
        }
        assert!(Form::parse(b"a=\xff").is_err());
    }
}
