//! A path template in the normal form of paths. A parameter stands for one segment, or for the middle of one.

use std::fmt::Write as _;

use super::{SEGMENTS_MAX, TEMPLATE_BYTES_MAX};
use crate::path::NormalPath;

/// A parsed template and its normal form.
pub(super) struct Template {
    segments: Vec<Segment>,
    text: String,
}

/// One segment of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Segment {
    /// Exactly this, in normal form.
    Literal(Box<str>),
    /// Anything but nothing, between these.
    Parameter { before: Box<str>, after: Box<str> },
}

/// What is wrong with a template.
pub(super) struct Bad {
    pub(super) what: String,
    pub(super) help: &'static str,
}

impl Template {
    pub(super) fn parse(given: &str) -> Result<Self, Bad> {
        let bad = |what: &str, help| Err(Bad { what: what.to_owned(), help });
        if given.len() > TEMPLATE_BYTES_MAX {
            return bad("a template is longer than 1024 bytes", "no request has such a path: see the document");
        }
        let Some(rest) = given.strip_prefix('/') else {
            return bad("a template begins with `/`", "write the whole path: `/charges/{id}`");
        };
        let (mut segments, mut text) = (Vec::new(), String::new());
        let mut parts = rest.split('/').peekable();
        while let Some(part) = parts.next() {
            if part.is_empty() && parts.peek().is_some() {
                return bad("an empty path segment is ambiguous", "no request has `//` in its path");
            }
            if segments.len() == SEGMENTS_MAX {
                return bad("a template has more than 64 segments", "no request should need as many");
            }
            text.push('/');
            segments.push(segment(part, &mut text)?);
        }
        Ok(Self { segments, text })
    }

    pub(super) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The template in normal form.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// The template without the names of its parameters: equal for templates that match the same paths.
    pub(super) fn shape(&self) -> String {
        self.segments.iter().fold(String::new(), |mut shape, segment| {
            let _ = match segment {
                Segment::Literal(text) => write!(shape, "/{text}"),
                Segment::Parameter { before, after } => write!(shape, "/{before}{{}}{after}"),
            };
            shape
        })
    }
}

impl Segment {
    /// Whether `came`, a segment of a normal path, is one of this parameter: what stands around it, and something between.
    pub(super) fn fits(before: &str, after: &str, came: &str) -> bool {
        let Some(value) = came.strip_prefix(before).and_then(|rest| rest.strip_suffix(after)) else { return false };
        // `{x}0` is not `%20`: an encoding is one character, and is not cut in two.
        let cut = value.as_bytes().iter().rev().take(2).any(|byte| *byte == b'%');
        !value.is_empty() && (after.is_empty() || !cut)
    }
}

/// Parses one segment and appends its normal form to `text`.
fn segment(part: &str, text: &mut String) -> Result<Segment, Bad> {
    let Some((before, rest)) = part.split_once('{') else {
        if part.contains('}') {
            return Err(unpaired());
        }
        let literal = normal("", part, "")?;
        text.push_str(&literal);
        return Ok(Segment::Literal(literal.into()));
    };
    let (name, after) = rest.split_once('}').ok_or_else(unpaired)?;
    if before.contains('}') || name.contains('{') {
        return Err(unpaired());
    }
    if after.contains(['{', '}']) {
        let what = "two parameters stand in one segment".to_owned();
        return Err(Bad { what, help: "where one ends and the other begins is ambiguous: make them one parameter" });
    }
    let odd = |c: char| !(c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | ' ' | '$' | '@'));
    if name.is_empty() || name.len() > 128 || name.starts_with('.') || name.contains(odd) {
        let what = format!("`{{{}}}` is not a parameter", super::shown(name));
        return Err(Bad {
            what,
            help: "a parameter is a name and stands for one segment: `{id}`, not `{+id}` or `{id*}`",
        });
    }
    let (before, after) = (normal("", before, "x")?, normal("x", after, "")?);
    let _ = write!(text, "{before}{{{name}}}{after}");
    Ok(Segment::Parameter { before: before.into(), after: after.into() })
}

/// `part` in the normal form of paths, read as it stands between `left` and `right`, which a value would fill.
fn normal(left: &str, part: &str, right: &str) -> Result<String, Bad> {
    let whole = format!("/{left}{part}{right}");
    let help = "write it as requests are judged, percent-encoded where RFC 3986 asks for it";
    let path = NormalPath::parse(&whole).map_err(|refused| Bad { what: refused.to_string(), help })?;
    if path.query().is_some() {
        return Err(Bad { what: "a template has no query".to_owned(), help: "leave out what follows the `?`" });
    }
    let text = path.as_str();
    let part =
        text.strip_prefix('/').and_then(|text| text.strip_prefix(left)).and_then(|text| text.strip_suffix(right));
    Ok(part.unwrap_or_default().to_owned())
}

fn unpaired() -> Bad {
    Bad {
        what: "a brace has no other".to_owned(),
        help: "a parameter stands in `{` and `}`; a brace that is text is `%7B`",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_comes_to_the_normal_form_of_paths_or_is_refused() {
        for (given, expected) in [
            ("", Err("a template begins with `/`")),
            ("charges", Err("a template begins with `/`")),
            ("/a//b", Err("an empty path segment is ambiguous")),
            ("//", Err("an empty path segment is ambiguous")),
            ("/a/../b", Err("dot segments are ambiguous")),
            ("/a/%2e%2e", Err("dot segments are ambiguous")),
            ("/a%2fb", Err("an encoded slash or backslash is ambiguous")),
            ("/a;b", Err("a path parameter is ambiguous; write a `;` that is text as `%3B`")),
            ("/café", Err("characters beyond ASCII must be percent-encoded UTF-8")),
            ("/%", Err("`%` must be followed by two hexadecimal digits")),
            ("/{a}%", Err("`%` must be followed by two hexadecimal digits")),
            ("/%4{a}", Err("`%` must be followed by two hexadecimal digits")),
            ("/a?b", Err("a template has no query")),
            ("/{a}?b={b}", Err("two parameters stand in one segment")),
            ("/{a", Err("a brace has no other")),
            ("/a}", Err("a brace has no other")),
            ("/}{a}", Err("a brace has no other")),
            ("/{{a}}", Err("a brace has no other")),
            ("/{}", Err("`{}` is not a parameter")),
            ("/{+a}", Err("`{+a}` is not a parameter")),
            ("/{proxy+}", Err("`{proxy+}` is not a parameter")),
            ("/{a*}", Err("`{a*}` is not a parameter")),
            ("/{a}-{b}", Err("two parameters stand in one segment")),
            ("/", Ok("/")),
            ("/charges/", Ok("/charges/")),
            ("/charges/{id}", Ok("/charges/{id}")),
            ("/%41/{id}/caf%c3%a9", Ok("/A/{id}/caf%C3%A9")),
            ("/files/{name}.json", Ok("/files/{name}.json")),
            ("/v1/{name}:cancel", Ok("/v1/{name}:cancel")),
            ("/.{name}", Ok("/.{name}")),
        ] {
            let parsed = Template::parse(given);
            let told = parsed.as_ref().map(|template| template.text()).map_err(|bad| bad.what.as_str());
            assert_eq!(told, expected, "{given}");
            if let Ok(template) = parsed {
                assert_eq!(Template::parse(template.text()).map(|again| again.text).ok().unwrap(), template.text);
            }
        }
        assert!(Template::parse(&"/a".repeat(SEGMENTS_MAX)).is_ok());
        assert!(Template::parse(&"/a".repeat(SEGMENTS_MAX + 1)).is_err());
        assert!(Template::parse(&format!("/{}", "a".repeat(TEMPLATE_BYTES_MAX))).is_err());
    }

    #[test]
    fn a_parameter_is_something_and_does_not_cut_an_encoding() {
        for (before, after, came, expected) in [
            ("", "", "", false),
            ("", "", "4", true),
            ("", ".json", ".json", false),
            ("", ".json", "a.json", true),
            ("v", "", "v", false),
            ("v", "", "v1", true),
            ("ab", "ba", "aba", false),
            ("", "0", "%20", false),
            ("", "20", "%20", false),
            ("", "0", "a%200", true),
            ("", "", "%20", true),
        ] {
            assert_eq!(Segment::fits(before, after, came), expected, "{before}{{}}{after} {came}");
        }
    }
}
