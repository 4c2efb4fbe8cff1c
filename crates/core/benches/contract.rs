//! What it costs to find the operation of a request, by the number of operations of the contract.
//!
//! | case | is |
//! |---|---|
//! | `literal` | a path of literal segments |
//! | `parameters` | a path with two parameters |
//! | `back` | a literal that leads nowhere, so that the parameter beside it is tried |
//! | `unknown` | a path that the contract does not have |
//! | `read` | the whole contract from its OpenAPI document, once |
//!
//! Prints a table, and one JSON object on its last line.

mod support;

use std::{collections::BTreeMap, hint::black_box, time::Instant};

use countersign_core::contract::{Contract, Matcher, Syntax, read_openapi};
use support::measure;

const TOTALS: [usize; 2] = [10, 1_000];
const CASES: [(&str, &str, bool); 4] = [
    ("literal", "/accounts/latest/resources-3", true),
    ("parameters", "/accounts/4242/resources-3/17", true),
    ("back", "/accounts/latest/resources-3/17", true),
    ("unknown", "/accounts/4242/nothing/17", false),
];

fn main() {
    let mut results: BTreeMap<String, BTreeMap<String, f64>> = BTreeMap::new();
    println!("{:>12} {:>10} {:>14}", "case", "operations", "ns");
    for total in TOTALS {
        let document = document(total);
        let begun = Instant::now();
        let contract = read(&document);
        let mut say = |case: &str, nanoseconds: f64| {
            println!("{case:>12} {total:>10} {nanoseconds:>14.0}");
            results.entry(format!("{case}_ns")).or_default().insert(total.to_string(), nanoseconds.round());
        };
        say("read", begun.elapsed().as_nanos() as f64);
        assert_eq!(contract.operations().len(), total);
        let matcher = Matcher::new(&contract);
        for (case, path, is_known) in CASES {
            assert_eq!(matcher.find("GET", path).is_some(), is_known, "{case}");
            say(
                case,
                measure(|| {
                    black_box(matcher.find(black_box("GET"), black_box(path)));
                }),
            );
        }
    }
    println!("{}", serde_json::to_string(&results).expect("numbers by name"));
}

/// Half of the operations end in a literal, half in a parameter.
fn document(total: usize) -> String {
    (0..total / 2).fold("openapi: 3.1.0\npaths:\n".to_owned(), |text, n| {
        text + &format!(
            "  /accounts/latest/resources-{n}:\n    get: {{ operationId: latest{n} }}\n  \
             /accounts/{{account}}/resources-{n}/{{resource}}:\n    get: {{ operationId: get{n} }}\n"
        )
    })
}

fn read(document: &str) -> Contract {
    read_openapi(document, Syntax::Yaml).unwrap_or_else(|mistakes| panic!("{mistakes:?}"))
}
