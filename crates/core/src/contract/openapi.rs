//! An OpenAPI 3.0 or 3.1 document, as YAML or JSON. Read of it: `servers`, for the base path; `paths`, with their methods and
//! `operationId`s; path items that a `$ref` names within the document. Everything else is passed over, bounded.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    marker::PhantomData,
    ops::Range,
};

use serde::{
    Deserialize, Deserializer,
    de::{self, IgnoredAny, MapAccess, Visitor},
};
use serde_saphyr::{Location, Spanned};

use super::{Contract, DOCUMENT_BYTES_MAX, Operation, Syntax, contract_of, mistake, shown};
use crate::policy::{Mistake, nearest};

/// The methods of a path item, OpenAPI 3.1.1, 4.8.9.
const METHODS: [&str; 8] = ["get", "put", "post", "delete", "options", "head", "patch", "trace"];
/// What else a path item may hold.
const BESIDE: [&str; 5] = ["$ref", "summary", "description", "parameters", "servers"];
/// Path items on the way from a path to the one that is meant.
const REFERENCES_MAX: usize = 16;
/// Deepest nesting of a document.
const DEPTH_MAX: usize = 64;
/// Nodes of a document, those that aliases repeat among them.
const NODES_MAX: usize = 250_000;

const UNREADABLE: &str =
    "`paths` is an object of path items, and keys are distinct; nesting, aliases and the number of nodes are bounded";

/// Reads an OpenAPI document; or every mistake that can be seen at once.
pub fn read_openapi(text: &str, syntax: Syntax) -> Result<Contract, Vec<Mistake>> {
    if text.len() > DOCUMENT_BYTES_MAX {
        let what = format!("the document has more than {DOCUMENT_BYTES_MAX} bytes");
        return Err(vec![mistake(0..0, what, "leave out examples and schemas: only paths and operation ids are read")]);
    }
    let document = match syntax {
        Syntax::Yaml => of_yaml(text),
        Syntax::Json => of_json(text),
    };
    let mut reading = Reading { document: document.map_err(|mistake| vec![mistake])?, mistakes: Vec::new() };
    reading.version();
    let (operations, spans) = reading.operations();
    if !reading.mistakes.is_empty() {
        return Err(reading.mistakes);
    }
    contract_of(operations, &spans)
}

fn of_yaml(text: &str) -> Result<Document, Mistake> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: DEPTH_MAX,
            flow_nesting_limit: DEPTH_MAX,
            max_nodes: NODES_MAX,
            max_events: 4 * NODES_MAX,
            max_documents: 1,
            max_aliases: 1_000,
            max_anchors: 1_000,
            max_recorded_anchor_events: NODES_MAX,
            max_recorded_anchor_bytes: 4 * DOCUMENT_BYTES_MAX,
            max_merge_keys: 1_000,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: NODES_MAX,
            max_replay_stack_depth: 16,
        },
        with_snippet: false,
        duplicate_keys: serde_saphyr::options::DuplicateKeyPolicy::PassThrough, // refused where it matters, by `once`
        strict_booleans: true,
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let span = error.location().map_or(0..0, |at| span_of(&at));
        let what = error.without_snippet().to_string();
        mistake(within(span, text), format!("could not be read as OpenAPI: {}", shown(&what)), UNREADABLE)
    })
}

fn of_json(text: &str) -> Result<Document, Mistake> {
    serde_json::from_str(text).map_err(|error| {
        let line: usize = text.split_inclusive('\n').take(error.line().saturating_sub(1)).map(str::len).sum();
        let at = line + error.column().saturating_sub(1);
        mistake(
            within(at..at, text),
            format!("could not be read as OpenAPI: {}", shown(&error.to_string())),
            UNREADABLE,
        )
    })
}

/// What of a document is read.
#[derive(Deserialize)]
struct Document {
    openapi: Option<Spanned<String>>,
    swagger: Option<Spanned<IgnoredAny>>,
    #[serde(default)]
    servers: Vec<Server>,
    #[serde(default)]
    paths: Members<PathItem>,
    #[serde(default)]
    components: Components,
}

#[derive(Deserialize)]
struct Server {
    url: Spanned<String>,
}

#[derive(Deserialize, Default)]
struct Components {
    #[serde(default, rename = "pathItems")]
    path_items: Members<PathItem>,
}

/// A path item.
#[derive(Default)]
struct PathItem {
    reference: Option<Spanned<String>>,
    operations: Vec<(&'static str, ApiOperation)>,
    servers: bool,
    unknown: Vec<Spanned<String>>,
}

#[derive(Deserialize)]
struct ApiOperation {
    #[serde(rename = "operationId")]
    id: Option<Spanned<String>>,
    servers: Option<IgnoredAny>,
}

/// The members of an object but for its extensions, in the order in which they stand, with the place of each key.
struct Members<T>(Vec<(Spanned<String>, T)>);

struct Reading {
    document: Document,
    mistakes: Vec<Mistake>,
}

impl Reading {
    fn version(&mut self) {
        let help = "a contract is an OpenAPI document of version 3.0 or 3.1: it begins with `openapi: 3.1.0`";
        let document = &self.document;
        let refused = match (&document.openapi, &document.swagger) {
            (Some(version), _) => {
                let mut parts = version.value.split('.');
                let known = matches!((parts.next(), parts.next()), (Some("3"), Some("0" | "1")));
                (!known).then(|| (span(version), format!("OpenAPI {} is not read", shown(&version.value))))
            }
            (None, Some(swagger)) => Some((span(swagger), "a Swagger 2.0 document is not read".to_owned())),
            (None, None) => Some((0..0, "the document does not say that it is OpenAPI".to_owned())),
        };
        self.mistakes.extend(refused.map(|(span, what)| mistake(span, what, help)));
    }

    fn operations(&mut self) -> (Vec<Operation>, Vec<Range<usize>>) {
        let base = self.base_path();
        let document = &self.document;
        let mut mistakes = Vec::new();
        let (mut operations, mut spans) = (Vec::new(), Vec::new());
        for (path, item) in &document.paths.0 {
            let Some(item) = document.resolved(item, &mut mistakes) else { continue };
            let full = format!("{base}{}", path.value);
            for (method, operation) in &item.operations {
                let method = method.to_ascii_uppercase();
                let (name, at) = match &operation.id {
                    Some(id) => (id.value.clone(), span(id)),
                    None => (named(&method, &full), span(path)),
                };
                operations.push(Operation { name: name.into(), method: method.into(), path: full.as_str().into() });
                spans.push(if at == (0..0) { span(path) } else { at });
            }
        }
        let items = document.paths.0.iter().chain(&document.components.path_items.0);
        for (path, item) in items {
            mistakes.extend(item.unread(path));
        }
        self.mistakes.extend(mistakes);
        (operations, spans)
    }

    /// The path below which all servers of the document are.
    fn base_path(&mut self) -> String {
        let help = "a contract has one base path: make the paths of all `servers` agree, or leave `servers` out";
        let mut base: Option<String> = None;
        for server in &self.document.servers {
            let path = base_path(&server.url.value);
            let differs = base.as_ref().is_some_and(|base| *base != path);
            if path.contains(['{', '}']) {
                let what = format!("the path of the server `{}` has a variable", shown(&server.url.value));
                self.mistakes.push(mistake(span(&server.url), what, help));
            } else if differs {
                let what =
                    format!("the server `{}` has another base path than the one before", shown(&server.url.value));
                self.mistakes.push(mistake(span(&server.url), what, help));
            } else {
                base = Some(path);
            }
        }
        base.unwrap_or_default()
    }
}

/// `/v1` of `https://api.example.com/v1/`, `//api.example.com/v1` and `/v1`.
fn base_path(url: &str) -> String {
    let path = match url.split_once("//") {
        Some((_, authority)) => authority.find('/').map_or("", |at| &authority[at..]),
        None => url,
    };
    let path = path.split(['?', '#']).next().unwrap_or_default().trim_matches('/');
    if path.is_empty() || path == "." { String::new() } else { format!("/{path}") }
}

/// What an operation without an id is called.
fn named(method: &str, path: &str) -> String {
    let normal = super::template::Template::parse(path).map(|template| template.text().to_owned());
    format!("{method} {}", normal.unwrap_or_else(|_| path.to_owned()))
}

impl Document {
    /// The path item that `item` is or refers to, within the document.
    fn resolved<'d>(&'d self, item: &'d PathItem, mistakes: &mut Vec<Mistake>) -> Option<&'d PathItem> {
        let (mut item, mut seen) = (item, BTreeSet::new());
        while let Some(reference) = &item.reference {
            let mut refuse = |what: String, help: &str| mistakes.push(mistake(span(reference), what, help));
            let target = reference.value.as_str();
            if !item.operations.is_empty() {
                refuse("operations stand beside a `$ref`".to_owned(), "move them to the path item that it names");
                return None;
            }
            if !target.starts_with('#') {
                let what = format!("`{}` is not in this document", shown(target));
                refuse(what, "nothing is fetched: bundle the document into one file");
                return None;
            }
            if !seen.insert(target) || seen.len() > REFERENCES_MAX {
                refuse(
                    format!("`{}` leads back to itself", shown(target)),
                    "let a `$ref` name a path item that has operations",
                );
                return None;
            }
            let Some(next) = self.pointed(target) else {
                let what = format!("`{}` names no path item", shown(target));
                refuse(what, "a path item is named as `#/components/pathItems/NAME` or `#/paths/~1PATH`");
                return None;
            };
            item = next;
        }
        Some(item)
    }

    /// The path item at this JSON pointer (RFC 6901, in the fragment form of its section 6).
    fn pointed(&self, target: &str) -> Option<&PathItem> {
        let (items, name) = match target.strip_prefix("#/components/pathItems/") {
            Some(name) => (&self.components.path_items, name),
            None => (&self.paths, target.strip_prefix("#/paths/")?),
        };
        let name = percent_encoding::percent_decode_str(name).decode_utf8().ok()?;
        let name = name.replace("~1", "/").replace("~0", "~");
        items.0.iter().find(|(key, _)| key.value == name).map(|(_, item)| item)
    }
}

impl PathItem {
    /// What stands in it and is not read, though it would change what the operations are.
    fn unread(&self, path: &Spanned<String>) -> Vec<Mistake> {
        let known = METHODS.into_iter().chain(BESIDE);
        let mut mistakes: Vec<Mistake> = self
            .unknown
            .iter()
            .map(|key| {
                let at = if span(key) == (0..0) { span(path) } else { span(key) };
                let lower = key.value.to_ascii_lowercase();
                let meant = if METHODS.contains(&lower.as_str()) {
                    Some(lower.as_str())
                } else {
                    nearest(&key.value, known.clone())
                };
                let help = match meant {
                    Some(meant) => format!("did you mean `{meant}`?"),
                    None => format!("a path item has {}", METHODS.join(", ")),
                };
                mistake(at, format!("unknown key `{}` in `{}`", shown(&key.value), shown(&path.value)), help)
            })
            .collect();
        if self.servers || self.operations.iter().any(|(_, operation)| operation.servers.is_some()) {
            let what = format!("`{}` has servers of its own", shown(&path.value));
            mistakes.push(mistake(
                span(path),
                what,
                "one service has one base path: it is read from `servers` of the document",
            ));
        }
        mistakes
    }
}

impl<T> Default for Members<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Members<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Object<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Object<T> {
            type Value = Members<T>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<T>, A::Error> {
                let (mut members, mut keys) = (Vec::new(), BTreeMap::new());
                while let Some(key) = map.next_key::<Spanned<String>>()? {
                    once(&mut keys, &key)?;
                    if key.value.starts_with("x-") {
                        map.next_value::<IgnoredAny>()?; // an extension may be anything
                        continue;
                    }
                    members.push((key, map.next_value()?));
                }
                Ok(Members(members))
            }
        }

        from.deserialize_map(Object(PhantomData))
    }
}

impl<'de> Deserialize<'de> for PathItem {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Object;

        impl<'de> Visitor<'de> for Object {
            type Value = PathItem;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a path item")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<PathItem, A::Error> {
                let (mut item, mut keys) = (PathItem::default(), BTreeMap::new());
                while let Some(key) = map.next_key::<Spanned<String>>()? {
                    once(&mut keys, &key)?;
                    if let Some(method) = METHODS.into_iter().find(|method| *method == key.value) {
                        item.operations.push((method, map.next_value()?));
                        continue;
                    }
                    match key.value.as_str() {
                        "$ref" => item.reference = Some(map.next_value()?),
                        other => {
                            map.next_value::<IgnoredAny>()?;
                            item.servers |= other == "servers";
                            if !other.starts_with("x-") && !BESIDE.contains(&other) {
                                item.unknown.push(key);
                            }
                        }
                    }
                }
                Ok(item)
            }
        }

        from.deserialize_map(Object)
    }
}

/// Two members of one name: readers differ in which of them they take.
fn once<E: de::Error>(keys: &mut BTreeMap<String, ()>, key: &Spanned<String>) -> Result<(), E> {
    match keys.insert(key.value.clone(), ()) {
        Some(()) => Err(E::custom(format!("the key `{}` stands here twice", shown(&key.value)))),
        None => Ok(()),
    }
}

fn span<T>(spanned: &Spanned<T>) -> Range<usize> {
    span_of(&spanned.referenced)
}

/// The bytes of the document; none where the parser does not say.
fn span_of(at: &Location) -> Range<usize> {
    let span = at.span();
    match (span.byte_offset(), span.byte_len()) {
        (Some(offset), len) => offset as usize..(offset + len.unwrap_or(0)) as usize,
        (None, _) => 0..0,
    }
}

/// `span`, no longer than `text` and between characters.
fn within(span: Range<usize>, text: &str) -> Range<usize> {
    let floor = |mut at: usize| {
        at = at.min(text.len());
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        at
    };
    floor(span.start)..floor(span.end.max(span.start))
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use proptest::prelude::*;

    use super::*;

    const CHARGES: &str = "\
openapi: 3.1.0
info: { title: Payments, version: '1' }
servers:
  - url: https://api.example.com/v1/
  - url: /v1
paths:
  /charges:
    get: { operationId: listCharges, responses: { 200: { description: all of them } } }
    post:
      operationId: createCharge
      requestBody: { content: { application/json: { schema: { $ref: '#/components/schemas/Charge' } } } }
  /charges/{charge_id}:
    parameters: [{ name: charge_id, in: path, required: true }]
    get:
      summary: one of them
    x-internal: true
  /health:
    $ref: '#/components/pathItems/Health'
  x-owner: team
components:
  pathItems:
    Health: { head: { operationId: isHealthy } }
  schemas:
    Charge: { type: object }
";

    fn told(text: &str, syntax: Syntax) -> String {
        match read_openapi(text, syntax) {
            Ok(contract) => contract
                .operations()
                .iter()
                .map(|operation| format!("{} = {} {}\n", operation.name, operation.method, operation.path))
                .collect(),
            Err(mistakes) => mistakes
                .iter()
                .map(|mistake| {
                    assert!(text.get(mistake.span.clone()).is_some(), "{:?}", mistake.span);
                    let line = text[..mistake.span.start].matches('\n').count() + 1;
                    format!("{line}: {} ({})\n", mistake.what, mistake.help.as_deref().unwrap_or_default())
                })
                .collect(),
        }
    }

    #[test]
    fn the_operations_of_a_document_are_its_contract() {
        expect![[r#"
            GET /v1/charges/{charge_id} = GET /v1/charges/{charge_id}
            createCharge = POST /v1/charges
            isHealthy = HEAD /v1/health
            listCharges = GET /v1/charges
        "#]]
        .assert_eq(&told(CHARGES, Syntax::Yaml));
        let json = r##"{"openapi":"3.0.3","info":{"title":"\ud83d\ude00","deep":[[[[1]]]]},"paths":{"/a":{"get":{"operationId":"a"}},
            "/b":{"$ref":"#/paths/~1a%2Fc"},"/a/c":{"trace":{}}}}"##;
        expect![[r#"
            TRACE /a/c = TRACE /a/c
            TRACE /b = TRACE /b
            a = GET /a
        "#]]
        .assert_eq(&told(json, Syntax::Json));
    }

    #[test]
    fn every_defect_is_told_with_its_line_and_how_to_mend_it() {
        let with = |paths: &str| format!("openapi: 3.0.3\npaths:\n{paths}");
        let mut found = String::new();
        for text in [
            "",
            "- a\n- b\n",
            "paths: {}\n",
            "swagger: '2.0'\npaths: {}\n",
            "openapi: 3.2.0\npaths: { /a: { get: {} } }\n",
            "openapi: 3.1.0\n",
            "openapi: 3.1.0\npaths: 7\n",
            "openapi: 3.1.0\npaths: {\n",
            "openapi: 3.1.0\nopenapi: 3.0.0\n",
            "openapi: 3.1.0\n---\nopenapi: 3.0.0\n",
            &with("  /a: { get: 7 }\n"),
            &with("  /a: { get: {} }\n  /a: { post: {} }\n"),
            &with("  /a:\n    get: { operationId: a }\n  /b:\n    get: { operationId: a }\n"),
            &with("  /a/{x}: { get: {} }\n  /a/{y}: { post: {} }\n"),
            &with("  /a/{x: { get: {} }\n"),
            &with("  a: { get: {} }\n"),
            &with("  /a/../b: { get: {} }\n"),
            &with("  /a:\n    GET: {}\n    pots: {}\n    colour: {}\n"),
            &with("  /a: { $ref: 'other.yaml#/paths/~1a' }\n  /b: { $ref: 'https://example.com/a.yaml' }\n"),
            &with("  /a: { $ref: '#/paths/~1b' }\n  /b: { $ref: '#/paths/~1a' }\n"),
            &with("  /a: { $ref: '#/components/pathItems/None' }\n"),
            &with("  /a: { $ref: '#/components/schemas/A' }\n"),
            &with("  /a: { $ref: '#/paths/~1b', get: {} }\n  /b: { get: {} }\n"),
            &with("  /a: { servers: [{ url: /v2 }], get: {} }\n  /b: { get: { servers: [] } }\n"),
            "openapi: 3.1.0\nservers:\n  - url: /v1\n  - url: /v2\n  - url: 'https://{x}.example/{y}'\npaths: { /a: { get: {} } }\n",
        ] {
            found += &told(text, Syntax::Yaml);
        }
        found += &told("{\"openapi\":\"3.1.0\",\n\"paths\":{\"/a\":{},\"/a\":{}}}", Syntax::Json);
        found += &told("{\"openapi\":\"3.1.0\",\n\"paths\":", Syntax::Json);
        found += &told(&" ".repeat(DOCUMENT_BYTES_MAX + 1), Syntax::Yaml);
        expect![[r#"
            1: the document does not say that it is OpenAPI (a contract is an OpenAPI document of version 3.0 or 3.1: it begins with `openapi: 3.1.0`)
            1: could not be read as OpenAPI: expected mapping start at line 1, column 1 (`paths` is an object of path items, and keys are distinct; nesting, aliases and the number of nodes are bounded)
            1: the document does not say that it is OpenAPI (a contract is an OpenAPI document of version 3.0 or 3.1: it begins with `openapi: 3.1.0`)
            1: a Swagger 2.0 document is not read (a contract is an OpenAPI document of version 3.0 or 3.1: it begins with `openapi: 3.1.0`)
            1: OpenAPI 3.2.0 is not read (a contract is an OpenAPI document of version 3.0 or 3.1: it begins with `openapi: 3.1.0`)
            1: there is no operation in it (with such a contract every request would be denied: name the document that describes the service)
            2: could not be read as OpenAPI: expected mapping start at line 2, column 8 (`paths` is an object of path items, and keys are distinct; nesting, aliases and the number of nodes are bounded)
            1: could not be read as OpenAPI: unclosed bracket '{' at line 2, column 8 (`paths` is an object of path items, and keys are distinct; nesting, aliases and the number of nodes are bounded)
            1: could not be read as OpenAPI: duplicate field `openapi` (`paths` is an object of path items, and keys are distinct; nesting, aliases and the number of nodes are bounded)
            2: could not be read as OpenAPI: budget breached: Documents { documents: 2 } at line 2, column 1 (`paths` is an object of path items, and keys are distinct; nesting, aliases and the number of nodes are bounded)
            3: could not be read as OpenAPI: expected mapping start at line 3, column 14 (`paths` is an object of path items, and keys are distinct; nesting, aliases and the number of nodes are bounded)
            3: could not be read as OpenAPI: the key `/a` stands here twice at line 3, column 3 (`paths` is an object of path items, and keys are distinct; nesting, aliases and the number of nodes are bounded)
            6: the operation `a` stands here twice (policies and records call it by its name: give each one of its own)
            4: `/a/{y}` matches the same paths as `/a/{x}`, the template of another operation (write both with the same names of parameters)
            3: `/a/{x`: a brace has no other (a parameter stands in `{` and `}`; a brace that is text is `%7B`)
            3: `a`: a template begins with `/` (write the whole path: `/charges/{id}`)
            3: `/a/../b`: dot segments are ambiguous (write it as requests are judged, percent-encoded where RFC 3986 asks for it)
            4: unknown key `GET` in `/a` (did you mean `get`?)
            5: unknown key `pots` in `/a` (did you mean `post`?)
            6: unknown key `colour` in `/a` (a path item has get, put, post, delete, options, head, patch, trace)
            3: `other.yaml#/paths/~1a` is not in this document (nothing is fetched: bundle the document into one file)
            4: `https://example.com/a.yaml` is not in this document (nothing is fetched: bundle the document into one file)
            3: `#/paths/~1b` leads back to itself (let a `$ref` name a path item that has operations)
            4: `#/paths/~1a` leads back to itself (let a `$ref` name a path item that has operations)
            3: `#/components/pathItems/None` names no path item (a path item is named as `#/components/pathItems/NAME` or `#/paths/~1PATH`)
            3: `#/components/schemas/A` names no path item (a path item is named as `#/components/pathItems/NAME` or `#/paths/~1PATH`)
            3: operations stand beside a `$ref` (move them to the path item that it names)
            3: `/a` has servers of its own (one service has one base path: it is read from `servers` of the document)
            4: `/b` has servers of its own (one service has one base path: it is read from `servers` of the document)
            4: the server `/v2` has another base path than the one before (a contract has one base path: make the paths of all `servers` agree, or leave `servers` out)
            5: the path of the server `https://{x}.example/{y}` has a variable (a contract has one base path: make the paths of all `servers` agree, or leave `servers` out)
            2: could not be read as OpenAPI: the key `/a` stands here twice at line 2 column 21 (`paths` is an object of path items, and keys are distinct; nesting, aliases and the number of nodes are bounded)
            2: could not be read as OpenAPI: EOF while parsing a value at line 2 column 8 (`paths` is an object of path items, and keys are distinct; nesting, aliases and the number of nodes are bounded)
            1: the document has more than 1048576 bytes (leave out examples and schemas: only paths and operation ids are read)
        "#]].assert_eq(&found);
    }

    #[test]
    fn what_grows_or_nests_without_end_is_refused_before_it_does() {
        let laughs = (1..30).fold("a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n".to_owned(), |text, n| {
            let before = format!("*a{}", n - 1);
            text + &format!("a{n}: &a{n} [{}]\n", vec![before; 9].join(", "))
        });
        let deep_flow = format!("x: {}{}", "[".repeat(100_000), "]".repeat(100_000));
        let deep_block: String = (0..1_000).map(|n| format!("{}a:\n", " ".repeat(n))).collect();
        let merged = "a: &a { b: 1 }\n".to_owned() + &"c:\n  <<: *a\n".repeat(10_000);
        for text in [laughs, deep_flow.clone(), deep_block, merged, "[1,".repeat(300_000), "&a ".repeat(10_000)] {
            let began = std::time::Instant::now();
            assert!(read_openapi(&format!("openapi: 3.1.0\n{text}"), Syntax::Yaml).is_err(), "{text:.60}");
            assert!(began.elapsed() < std::time::Duration::from_secs(5), "{text:.60}");
        }
        let json = format!("{{\"openapi\":\"3.1.0\",\"paths\":{}", "{\"a\":".repeat(100_000));
        assert!(read_openapi(&json, Syntax::Json).is_err());
        let json = format!("{{\"openapi\":\"3.1.0\",\"x\":{}", &deep_flow[3..]);
        assert!(read_openapi(&json, Syntax::Json).is_err());
    }

    #[test]
    fn aliases_within_bounds_are_read() {
        let text = "openapi: 3.1.0\nx-get: &get { summary: one }\npaths:\n  /a: { get: *get }\n  /b: { get: *get }\n";
        assert_eq!(told(text, Syntax::Yaml), "GET /a = GET /a\nGET /b = GET /b\n");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn no_text_makes_the_readers_panic(text in ".*", cut in 0usize..1_000, at in 0usize..1_000, put in "\\PC{0,6}") {
            for text in [text, CHARGES.chars().take(cut).collect::<String>(), {
                let mut changed: Vec<char> = CHARGES.chars().collect();
                let at = at.min(changed.len());
                changed.splice(at..(at + 3).min(changed.len()), put.chars());
                changed.into_iter().collect()
            }] {
                for syntax in [Syntax::Yaml, Syntax::Json] {
                    for mistake in read_openapi(&text, syntax).err().unwrap_or_default() {
                        prop_assert!(text.get(mistake.span.clone()).is_some(), "{:?} {}", mistake.span, mistake.what);
                    }
                }
            }
        }
    }
}
