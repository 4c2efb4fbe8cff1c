//! The contract of a service: the operations that it has, and which of them a request is.
//!
//! A contract is read from what describes the service anyway, an OpenAPI document or a protobuf descriptor set. Of it only
//! the operations are kept: name, method and path template. What a request's body may hold is the application's matter.
//! The list has one form, canonical JSON, whose digest the ledger holds.
//!
//! | furniture | holds |
//! |---|---|
//! | `openapi` | an OpenAPI 3.0 or 3.1 document, as YAML or JSON |
//! | `descriptor` | a `FileDescriptorSet`, as `protoc` and `buf` write it |
//! | `template` | a path template in the normal form of paths |
//! | `matcher` | from method and path to the operation, however many there are |
//!
//! No file is opened in here and no reference is followed out of a document.

mod descriptor;
mod matcher;
mod openapi;
mod template;

use std::{collections::BTreeMap, fmt, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{canonical, canonical::Digest, ledger::BODY_BYTES_MAX, policy::Mistake};

pub use descriptor::read_descriptor_set;
pub use matcher::Matcher;
pub use openapi::read_openapi;
use template::Template;

/// Longest document that a contract is read from, in bytes.
pub const DOCUMENT_BYTES_MAX: usize = 1 << 20;
/// Operations of one contract.
pub const OPERATIONS_MAX: usize = 4_096;
/// Longest name of an operation, in bytes.
pub const NAME_BYTES_MAX: usize = 256;
/// Longest path template, in bytes.
pub const TEMPLATE_BYTES_MAX: usize = 1_024;
/// Segments of one path template.
pub const SEGMENTS_MAX: usize = 64;

/// The operations of a service, in the order of their names.
///
/// INVARIANT (one-operation): names are distinct, and no two operations of one method have templates that match the same
/// paths, so that a request is one operation or none. Only [`Contract::new`] makes one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Listed")]
pub struct Contract {
    operations: Arc<[Operation]>,
}

/// One operation of a service.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Operation {
    /// As policies name it, after its service: `createCharge`, `GET /charges/{id}`, `shop.Orders/Place`.
    pub name: Arc<str>,
    /// The HTTP method; `POST` for gRPC.
    pub method: Arc<str>,
    /// The path template in normal form: `/charges/{id}`.
    pub path: Arc<str>,
}

/// Whether a document is YAML or JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Syntax {
    /// YAML 1.2.
    Yaml,
    /// JSON.
    Json,
}

/// Why an operation does not fit into a contract.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit {
    /// Its place among those given.
    pub at: usize,
    /// What is wrong, lower case, no full stop.
    pub what: String,
    /// How to mend it.
    pub help: String,
}

impl Contract {
    /// The contract of these operations, whose templates are brought to their normal form; or everything that is wrong.
    pub fn new(mut operations: Vec<Operation>) -> Result<Self, Vec<Unfit>> {
        let mut unfit = Vec::new();
        let mut names: BTreeMap<Arc<str>, usize> = BTreeMap::new();
        let mut shapes: BTreeMap<String, Arc<str>> = BTreeMap::new();
        let mut taken: BTreeMap<(Arc<str>, String), usize> = BTreeMap::new();
        for (at, operation) in operations.iter_mut().enumerate() {
            let mut refuse = |what: String, help: &str| unfit.push(Unfit { at, what, help: help.to_owned() });
            if at == OPERATIONS_MAX {
                refuse(format!("there are more than {OPERATIONS_MAX} operations"), "split the service");
                break;
            }
            if !is_name(&operation.name) {
                let what = format!("`{}` is not the name of an operation", shown(&operation.name));
                refuse(what, "a name has 1 to 256 bytes and no control characters");
            } else if names.insert(operation.name.clone(), at).is_some() {
                let what = format!("the operation `{}` stands here twice", operation.name);
                refuse(what, "policies and records call it by its name: give each one of its own");
            }
            if !is_method(&operation.method) {
                refuse(format!("`{}` is not a method", shown(&operation.method)), "a method is written like `GET`");
            }
            let template = match Template::parse(&operation.path) {
                Ok(template) => template,
                Err(bad) => {
                    refuse(format!("`{}`: {}", shown(&operation.path), bad.what), bad.help);
                    continue;
                }
            };
            let shape = template.shape();
            match shapes.get(&shape) {
                Some(text) if **text != *template.text() => {
                    let path = &operation.path;
                    let what =
                        format!("`{path}` matches the same paths as `{text}`, the template of another operation");
                    refuse(what, "write both with the same names of parameters");
                }
                Some(_) => {}
                None => drop(shapes.insert(shape.clone(), template.text().into())),
            }
            if taken.insert((operation.method.clone(), shape), at).is_some() {
                let what = format!("two operations have the method and path `{} {}`", operation.method, operation.path);
                refuse(what, "a request must be one operation: remove one of them");
            }
            operation.path = template.text().into();
        }
        if !unfit.is_empty() {
            return Err(unfit);
        }
        operations.sort();
        Ok(Self { operations: operations.into() })
    }

    /// The operations, in the order of their names.
    pub fn operations(&self) -> &[Operation] {
        &self.operations
    }

    /// The operation of this name.
    pub fn named(&self, name: &str) -> Option<&Operation> {
        let at = self.operations.binary_search_by(|operation| (*operation.name).cmp(name)).ok()?;
        self.operations.get(at)
    }

    /// As the ledger's bodies hold it: canonical JSON (RFC 8785).
    pub fn to_body(&self) -> String {
        String::from_utf8(canonical::encode(self)).expect("INVARIANT: JSON is UTF-8")
    }

    /// The digest of [`Self::to_body`].
    pub fn digest(&self) -> Digest {
        Digest::of_canonical(self)
    }

    /// Reads a body of the ledger, which is in its one form or refused.
    pub fn of_body(text: &str) -> Result<Self, String> {
        if text.len() > BODY_BYTES_MAX {
            return Err(format!("a contract has at most {BODY_BYTES_MAX} bytes"));
        }
        let contract: Self = serde_json::from_str(text).map_err(|error| format!("not a contract: {error}"))?;
        if contract.to_body() == text { Ok(contract) } else { Err("the contract is not in its canonical form".into()) }
    }
}

/// The operations as they come, in any order and of any kind.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Listed {
    operations: Vec<Operation>,
}

impl TryFrom<Listed> for Contract {
    type Error = Unfit;

    fn try_from(listed: Listed) -> Result<Self, Unfit> {
        Self::new(listed.operations).map_err(|mut unfit| unfit.swap_remove(0))
    }
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Unfit {}

fn is_name(name: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len()) && !name.chars().any(char::is_control)
}

fn is_method(method: &str) -> bool {
    (1..=32).contains(&method.len()) && method.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'-')
}

/// What a stranger wrote, short enough for a line.
fn shown(given: &str) -> String {
    const CHARS_MAX: usize = 80;
    let mut shown: String =
        given.chars().take(CHARS_MAX).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if given.chars().nth(CHARS_MAX).is_some() {
        shown.push('…');
    }
    shown
}

fn mistake(span: std::ops::Range<usize>, what: impl Into<String>, help: impl Into<String>) -> Mistake {
    Mistake { span, what: what.into(), help: Some(help.into()) }
}

/// What was found in a document, as a contract. `spans` says where each operation stands.
fn contract_of(operations: Vec<Operation>, spans: &[std::ops::Range<usize>]) -> Result<Contract, Vec<Mistake>> {
    if operations.is_empty() {
        let help = "with such a contract every request would be denied: name the document that describes the service";
        return Err(vec![mistake(0..0, "there is no operation in it", help)]);
    }
    let contract = Contract::new(operations).map_err(|unfit| -> Vec<Mistake> {
        let at = |unfit: &Unfit| spans.get(unfit.at).cloned().unwrap_or(0..0);
        unfit.into_iter().map(|unfit| mistake(at(&unfit), unfit.what, unfit.help)).collect()
    })?;
    if contract.to_body().len() > BODY_BYTES_MAX {
        let what = format!("its operations take more than {BODY_BYTES_MAX} bytes");
        return Err(vec![mistake(0..0, what, "split the service")]);
    }
    Ok(contract)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(name: &str, method: &str, path: &str) -> Operation {
        Operation { name: name.into(), method: method.into(), path: path.into() }
    }

    fn refused(operations: &[(&str, &str, &str)]) -> String {
        let operations = operations.iter().map(|(name, method, path)| operation(name, method, path)).collect();
        let Err(unfit) = Contract::new(operations) else { return "taken".into() };
        unfit.iter().map(|unfit| format!("{} {unfit}", unfit.at)).collect::<Vec<_>>().join("; ")
    }

    #[test]
    fn a_contract_in_which_a_request_could_be_two_operations_is_refused() {
        for (given, expected) in [
            (&[("a", "GET", "/x"), ("a", "POST", "/x")][..], "1 the operation `a` stands here twice"),
            (&[("a", "GET", "/x"), ("b", "GET", "/x")], "1 two operations have the method and path `GET /x`"),
            (
                &[("a", "GET", "/x/{id}"), ("b", "POST", "/x/{name}")],
                "1 `/x/{name}` matches the same paths as `/x/{id}`, the template of another operation",
            ),
            (&[("a", "GET", "/A"), ("b", "GET", "/%41")], "1 two operations have the method and path `GET /%41`"),
            (&[("", "GET", "/x")], "0 `` is not the name of an operation"),
            (&[("a\n", "GET", "/x")], "0 `a\u{fffd}` is not the name of an operation"),
            (&[("a", "get", "/x")], "0 `get` is not a method"),
            (&[("a", "GET", "x")], "0 `x`: a template begins with `/`"),
            (&[("a", "GET", "/x/{id}"), ("b", "GET", "/x/me"), ("c", "POST", "/x/{id}")], "taken"),
        ] {
            assert_eq!(refused(given), expected, "{given:?}");
        }
        let many = |count: usize| {
            Contract::new((0..count).map(|n| operation(&format!("o{n}"), "GET", &format!("/{n}"))).collect())
        };
        assert!(many(OPERATIONS_MAX).is_ok());
        assert!(many(OPERATIONS_MAX + 1).unwrap_err()[0].what.contains("more than 4096"));
    }

    #[test]
    fn a_contract_has_one_form_whatever_the_order_it_was_written_in() {
        let (a, b) = (operation("a", "GET", "/x/{id}"), operation("b", "PUT", "/caf%c3%a9"));
        let contract = Contract::new(vec![b.clone(), a.clone()]).unwrap();
        assert_eq!(contract, Contract::new(vec![a, b]).unwrap());
        let body = contract.to_body();
        assert_eq!(
            body,
            r#"{"operations":[{"method":"GET","name":"a","path":"/x/{id}"},{"method":"PUT","name":"b","path":"/caf%C3%A9"}]}"#
        );
        assert_eq!(contract.digest(), Digest::of(body.as_bytes()));
        assert_eq!(Contract::of_body(&body).unwrap(), contract);
        assert_eq!(&*contract.named("b").unwrap().method, "PUT");
        assert_eq!(contract.named("c"), None);
        for other in [
            body.replace("},{", "}, {"),
            r#"{"operations":[{"method":"PUT","name":"b","path":"/b"},{"method":"GET","name":"a","path":"/a"}]}"#
                .into(),
            r#"{"operations":[{"method":"PUT","name":"b","path":"/%41"}]}"#.into(),
            r#"{"operations":[{"method":"PUT","name":"b","path":"/b","x":1}]}"#.into(),
            r#"{"operations":[{"method":"GET","name":"a","path":"/x"},{"method":"GET","name":"b","path":"/x"}]}"#
                .into(),
            "[]".into(),
            " ".repeat(BODY_BYTES_MAX + 1),
        ] {
            assert!(Contract::of_body(&other).is_err(), "{other:.60}");
        }
    }

    #[test]
    fn a_thousand_operations_fit_into_a_body() {
        let operations = (0..1_000).map(|n| {
            let path = format!("/accounts/{{account_id}}/resources-{n}/{{resource_id}}/transitions");
            operation(&format!("transitionTheResourceNumber{n}OfAnAccount"), "POST", &path)
        });
        let contract = Contract::new(operations.collect()).unwrap();
        assert!(contract.to_body().len() < BODY_BYTES_MAX, "{}", contract.to_body().len());
    }
}
