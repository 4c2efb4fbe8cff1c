//! From method and path to the operation: a tree of segments for each method, so that what a request costs grows with the
//! segments of its path and not with the contract. Nothing is allocated for a request.
//!
//! A literal segment wins over a parameter; of two parameters with text around them, the one with more before it, then
//! the one with more after it. Where the winner leads nowhere, the next is tried: `/users/{id}/orders` is found beside
//! `/users/me`.

use hashbrown::HashMap;
use rustc_hash::FxBuildHasher;

use super::{
    Contract,
    template::{Segment, Template},
};

/// Finds the operation of a request.
#[derive(Debug)]
pub struct Matcher {
    roots: Vec<(Box<str>, usize)>,
    nodes: Vec<Node>,
}

#[derive(Debug, Default)]
struct Node {
    literals: HashMap<Box<str>, usize, FxBuildHasher>,
    parameters: Vec<Parameter>,
    /// The place in the contract of the operation whose template ends here.
    operation: Option<usize>,
}

#[derive(Debug)]
struct Parameter {
    before: Box<str>,
    after: Box<str>,
    next: usize,
}

impl Matcher {
    /// The matcher of all operations of `contract`.
    pub fn new(contract: &Contract) -> Self {
        let mut matcher = Self { roots: Vec::new(), nodes: Vec::new() };
        for (at, operation) in contract.operations().iter().enumerate() {
            let Ok(template) = Template::parse(&operation.path) else { continue }; // a contract holds no other
            let mut node = matcher.root(&operation.method);
            for segment in template.segments() {
                node = matcher.child(node, segment);
            }
            matcher.nodes[node].operation = Some(at);
        }
        for node in &mut matcher.nodes {
            node.parameters.sort_by(|a, b| {
                let weight = |one: &Parameter| (one.before.len(), one.after.len());
                weight(b).cmp(&weight(a)).then_with(|| (&a.before, &a.after).cmp(&(&b.before, &b.after)))
            });
        }
        matcher
    }

    /// The place in [`Contract::operations`] of what a request with this method and this path, in normal form and without
    /// query, is; `None`: the contract does not have it.
    pub fn find(&self, method: &str, path: &str) -> Option<usize> {
        let (_, root) = self.roots.iter().find(|(known, _)| **known == *method)?;
        self.below(*root, path.strip_prefix('/')?)
    }

    /// The methods of the contract.
    pub fn methods(&self) -> impl Iterator<Item = &str> {
        self.roots.iter().map(|(method, _)| &**method)
    }

    /// As deep as the deepest template at most.
    fn below(&self, node: usize, rest: &str) -> Option<usize> {
        let node = &self.nodes[node];
        let (segment, after) = match rest.split_once('/') {
            Some((segment, after)) => (segment, Some(after)),
            None => (rest, None),
        };
        let follow = |next: usize| match after {
            Some(rest) => self.below(next, rest),
            None => self.nodes[next].operation,
        };
        let literal = node.literals.get(segment).and_then(|next| follow(*next));
        literal.or_else(|| {
            let fitting = node.parameters.iter().filter(|one| Segment::fits(&one.before, &one.after, segment));
            fitting.map(|one| one.next).find_map(follow)
        })
    }

    fn root(&mut self, method: &str) -> usize {
        if let Some((_, root)) = self.roots.iter().find(|(known, _)| **known == *method) {
            return *root;
        }
        let root = self.grow();
        self.roots.push((method.into(), root));
        root
    }

    fn child(&mut self, node: usize, segment: &Segment) -> usize {
        let known = match segment {
            Segment::Literal(text) => self.nodes[node].literals.get(text).copied(),
            Segment::Parameter { before, after } => {
                let same = |one: &&Parameter| one.before == *before && one.after == *after;
                self.nodes[node].parameters.iter().find(same).map(|one| one.next)
            }
        };
        if let Some(known) = known {
            return known;
        }
        let next = self.grow();
        let node = &mut self.nodes[node];
        match segment.clone() {
            Segment::Literal(text) => drop(node.literals.insert(text, next)),
            Segment::Parameter { before, after } => node.parameters.push(Parameter { before, after, next }),
        }
        next
    }

    fn grow(&mut self) -> usize {
        self.nodes.push(Node::default());
        self.nodes.len() - 1
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::Operation, *};
    use crate::path::NormalPath;

    fn contract(operations: &[(&str, &str)]) -> Contract {
        let operations = operations.iter().map(|(method, path)| Operation {
            name: format!("{method} {path}").into(),
            method: (*method).into(),
            path: (*path).into(),
        });
        Contract::new(operations.collect()).unwrap()
    }

    fn found<'c>(contract: &'c Contract, method: &str, path: &str) -> Option<&'c str> {
        Matcher::new(contract).find(method, path).map(|at| &*contract.operations()[at].name)
    }

    #[test]
    fn what_the_contract_does_not_have_is_not_found_and_the_nearest_template_wins() {
        let contract = contract(&[
            ("GET", "/"),
            ("GET", "/charges"),
            ("POST", "/charges"),
            ("GET", "/charges/{id}"),
            ("DELETE", "/charges/{id}"),
            ("GET", "/charges/latest"),
            ("GET", "/charges/{id}/refunds"),
            ("GET", "/charges/latest/refunds/{refund}"),
            ("GET", "/files/{name}.json"),
            ("GET", "/files/v{name}.json"),
            ("GET", "/files/{name}"),
            ("GET", "/slash/"),
        ]);
        for (method, path, expected) in [
            ("GET", "", None),
            ("GET", "charges", None),
            ("GET", "/nothing", None),
            ("get", "/charges", None),
            ("HEAD", "/charges", None),
            ("OPTIONS", "/charges", None),
            ("PUT", "/charges/4", None),
            ("GET", "/charges/", None),
            ("GET", "/charges/4/", None),
            ("GET", "/charges/4/refunds/5", None),
            ("GET", "/charges/4/refunds/", None),
            ("GET", "/files", None),
            ("GET", "/files/", None),
            ("GET", "/slash", None),
            ("GET", "/", Some("GET /")),
            ("GET", "/charges", Some("GET /charges")),
            ("POST", "/charges", Some("POST /charges")),
            ("GET", "/charges/4", Some("GET /charges/{id}")),
            ("GET", "/charges/%20", Some("GET /charges/{id}")),
            ("GET", "/charges/latest", Some("GET /charges/latest")),
            ("DELETE", "/charges/latest", Some("DELETE /charges/{id}")),
            ("GET", "/charges/latest/refunds", Some("GET /charges/{id}/refunds")),
            ("GET", "/charges/latest/refunds/7", Some("GET /charges/latest/refunds/{refund}")),
            ("GET", "/files/a", Some("GET /files/{name}")),
            ("GET", "/files/.json", Some("GET /files/{name}")),
            ("GET", "/files/a.json", Some("GET /files/{name}.json")),
            ("GET", "/files/v1.json", Some("GET /files/v{name}.json")),
            ("GET", "/slash/", Some("GET /slash/")),
        ] {
            assert_eq!(found(&contract, method, path), expected, "{method} {path}");
        }
    }

    /// The best of all templates that fit, segment by segment: a literal, then the parameter with the most text around it.
    fn naive(contract: &Contract, method: &str, path: &str) -> Option<usize> {
        let came: Vec<&str> = path.strip_prefix('/')?.split('/').collect();
        let rank = |operation: &Operation| {
            let template = Template::parse(&operation.path).ok()?;
            if *operation.method != *method || template.segments().len() != came.len() {
                return None;
            }
            template
                .segments()
                .iter()
                .zip(&came)
                .map(|(segment, came)| match segment {
                    Segment::Literal(text) => (**text == **came).then_some((0, 0, 0)),
                    Segment::Parameter { before, after } => Segment::fits(before, after, came).then_some((
                        1,
                        usize::MAX - before.len(),
                        usize::MAX - after.len(),
                    )),
                })
                .collect::<Option<Vec<_>>>()
        };
        let ranked =
            contract.operations().iter().enumerate().filter_map(|(at, operation)| Some((rank(operation)?, at)));
        ranked.min().map(|(_, at)| at)
    }

    fn segments(of: &'static [&'static str]) -> impl Strategy<Value = String> {
        prop::collection::vec(prop::sample::select(of), 0..5).prop_map(|parts| format!("/{}", parts.join("/")))
    }

    const TEMPLATES: &[&str] = &["a", "b", "a%20b", "{x}", "a{x}", "{x}b", "a{x}b"];
    const PATHS: &[&str] = &["a", "b", "ab", "a%20b", "axb", "c", "%20"];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        /// PROVES (one-operation).
        #[test]
        fn the_tree_finds_what_a_walk_over_all_templates_finds(
            templates in prop::collection::btree_set((prop::sample::select(&["GET", "POST"][..]), segments(TEMPLATES)), 1..40),
            asked in prop::collection::vec((prop::sample::select(&["GET", "POST", "PUT"][..]), segments(PATHS)), 1..40),
        ) {
            let operations: Vec<(&str, &str)> = templates.iter().map(|(method, path)| (*method, path.as_str())).collect();
            let contract = contract(&operations);
            let matcher = Matcher::new(&contract);
            for (method, path) in &asked {
                prop_assert_eq!(matcher.find(method, path), naive(&contract, method, path), "{} {}", method, path);
            }
        }

        #[test]
        fn no_path_makes_the_tree_panic(method in ".*", path in prop_oneof!["/.*", ".*", "/[ab/%{}]{0,40}"]) {
            let contract = contract(&[("GET", "/{x}/a{y}b"), ("GET", "/a/{z}.json/"), ("GET", "/%C3%A9{x}")]);
            let _ = Matcher::new(&contract).find(&method, &path);
            let _ = Matcher::new(&contract).find("GET", &path);
            if let Ok(normal) = NormalPath::parse(&path) {
                prop_assert_eq!(Matcher::new(&contract).find("GET", normal.as_str()), naive(&contract, "GET", normal.as_str()));
            }
        }
    }
}
