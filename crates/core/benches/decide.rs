//! What a decision costs, by the number of policies: in nanoseconds, and in instructions where valgrind is installed.
//!
//! | case | is |
//! |---|---|
//! | `remembered` | ten candidates with conditions, asked again: found in a worker's memory by the parts that they read |
//! | `remembered_scope` | ten candidates without conditions, asked again |
//! | `cold` | ten candidates with conditions, nothing remembered: index, context, evaluation |
//! | `cold_kept` | the same, the candidates of the place being kept: what a new path costs a running worker |
//! | `all_candidates` | every policy is a candidate with a condition, nothing remembered |
//! | `compile` | the whole law from text, once |
//!
//! Prints a table, and one JSON object on its last line.

mod support;

use std::{collections::BTreeMap, hint::black_box, process::Command, sync::Arc, time::Instant};

use countersign_core::{
    change::{Member, Revision},
    identity::{ServiceName, SpiffeId, TrustDomain},
    policy::{Action, Context, Judge, Law, Query, parse_file},
    risk::Condition,
    service::{Protocol, ServiceSpec},
    view::{View, ViewPolicy},
};
use support::measure;

const TOTALS: [usize; 4] = [10, 100, 1_000, 10_000];
const CANDIDATES: usize = 10;
const CASES: [&str; 5] = ["remembered", "remembered_scope", "cold", "cold_kept", "all_candidates"];

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, flag, case, total, count] = &arguments[..]
        && flag == "--count"
    {
        let decide = decider(case, total.parse().expect("a number of policies"));
        (0..count.parse::<usize>().expect("a number of decisions")).for_each(decide);
        return;
    }
    let mut results: BTreeMap<String, BTreeMap<String, f64>> = BTreeMap::new();
    println!("{:>18} {:>8} {:>14} {:>14}", "case", "policies", "ns", "instructions");
    for case in CASES {
        for total in TOTALS {
            let (mut decide, mut done) = (decider(case, total), 0);
            let nanoseconds = measure(|| {
                decide(done);
                done += 1;
            });
            let instructions = instructions(case, total);
            let shown = instructions.map_or("-".to_owned(), |count| format!("{count:.0}"));
            println!("{case:>18} {total:>8} {nanoseconds:>14.0} {shown:>14}");
            let result = results.entry(format!("{case}_ns")).or_default();
            result.insert(total.to_string(), nanoseconds.round());
            if let Some(count) = instructions {
                results.entry(format!("{case}_instructions")).or_default().insert(total.to_string(), count.round());
            }
        }
    }
    for total in TOTALS {
        let view = view(total, &narrow);
        let begun = Instant::now();
        black_box(compiled(&view));
        let nanoseconds = begun.elapsed().as_nanos() as f64;
        println!("{:>18} {total:>8} {nanoseconds:>14.0} {:>14}", "compile", "-");
        results.entry("compile_ns".to_owned()).or_default().insert(total.to_string(), nanoseconds);
    }
    println!("{}", serde_json::to_string(&results).expect("numbers by name"));
}

/// What makes decision number `n` of a case.
fn decider(case: &str, total: usize) -> Box<dyn FnMut(usize)> {
    let policy: &dyn Fn(usize) -> String = match case {
        "all_candidates" => &wide,
        "remembered_scope" => &scope_only,
        _ => &narrow,
    };
    let law = Arc::new(compiled(&view(total, policy)));
    let principal = SpiffeId::parse("spiffe://shop.example/web").expect("a SPIFFE ID");
    let service = ServiceName::parse("catalog").expect("a service name");
    let query = move |path: &str, decide: &mut dyn FnMut(&Query<'_>)| {
        decide(&Query {
            principal: &principal,
            action: Action::Http("GET"),
            service: &service,
            path,
            context: Context {
                method: "GET",
                host: "catalog.mesh",
                protocol: Protocol::Http,
                size: None,
                origin: [10, 0, 0, 7].into(),
                now: 1_795_365_000,
                first_contact: false,
                token: None,
                condition: Condition::default(),
            },
        });
    };
    let mut judge = Judge::new(law.clone());
    match case {
        "remembered" | "remembered_scope" => Box::new(move |_| {
            query("/items/42", &mut |query| {
                black_box(judge.decide(query));
            });
        }),
        "cold_kept" => {
            // More paths than are remembered, so that none is met again.
            let paths: Vec<String> = (0..20_000).map(|n| format!("/items/{n}")).collect();
            Box::new(move |n| {
                query(&paths[n % paths.len()], &mut |query| {
                    black_box(judge.decide(query));
                });
            })
        }
        _ => Box::new(move |_| {
            query("/items/42", &mut |query| {
                black_box(law.decide(query));
            });
        }),
    }
}

/// Ten policies are for the caller; the others are for other workloads, paths and actions.
fn narrow(at: usize) -> String {
    if at >= CANDIDATES {
        return other(at);
    }
    let condition = match at % 5 {
        0 => r#"when { context.request.path like "/items/*" }"#,
        1 => r#"when { context.request.host == "catalog.mesh" }"#,
        2 => r#"unless { context.time.hour < 6 || context.time.hour > 22 }"#,
        3 => r#"when { principal in Role::"reader" && context.request.path like "/*/42" }"#,
        _ => r#"when { context.request.method == "GET" && !context.first_contact }"#,
    };
    format!(
        "@id(\"p{at}\") permit (principal in Role::\"reader\", action in Action::\"read\", resource in Service::\"catalog\") {condition};\n"
    )
}

fn scope_only(at: usize) -> String {
    if at >= CANDIDATES {
        return other(at);
    }
    format!(
        "@id(\"p{at}\") permit (principal in Role::\"reader\", action in Action::\"read\", resource in Service::\"catalog\");\n"
    )
}

fn other(at: usize) -> String {
    let (principal, action, resource) = match at % 3 {
        0 => (format!("principal == Workload::\"w{}\"", at % 700), "http:GET", "in Service::\"catalog\"".to_owned()),
        1 => ("principal".to_owned(), "http:GET", format!("== Operation::\"catalog/private/{at}\"")),
        _ => (format!("principal in Role::\"r{}\"", at % 50), "http:POST", "in Service::\"catalog\"".to_owned()),
    };
    format!(
        "@id(\"p{at}\") permit ({principal}, action == Action::\"{action}\", resource {resource}) when {{ context.request.path like \"/{at}/*\" }};\n"
    )
}

fn wide(at: usize) -> String {
    format!("@id(\"p{at}\") permit (principal, action, resource) when {{ context.request.path like \"/{at}/*\" }};\n")
}

fn view(total: usize, policy: &dyn Fn(usize) -> String) -> View {
    let text: String = (0..total).map(policy).collect();
    let policies = parse_file("bench.cedar", &text).expect("valid policies");
    let member = |name: String| Member::Service(ServiceName::parse(&name).expect("a service name"));
    let mut roles = BTreeMap::from([("reader".into(), [member("web".to_owned())].into())]);
    for role in 0..50 {
        roles.insert(format!("r{role}").into(), (0..10).map(|n| member(format!("w{}", role * 10 + n))).collect());
    }
    View {
        revision: Revision(1),
        trust_domain: TrustDomain::parse("shop.example").expect("a trust domain"),
        service: ServiceName::parse("catalog").expect("a service name"),
        spec: Some(ServiceSpec::new(Protocol::Http)),
        contract: None,
        policies: policies
            .into_iter()
            .map(|policy| ViewPolicy { id: policy.id, file: "bench.cedar".into(), text: policy.text })
            .collect(),
        roles,
        services: BTreeMap::new(),
        routes: BTreeMap::new(),
        barred: [].into(),
        edges: [].into(),
    }
}

fn compiled(view: &View) -> Law {
    Law::compile(view).unwrap_or_else(|errors| panic!("{errors:?}"))
}

/// Instructions of one decision, counted by valgrind: the difference between two runs of this program.
fn instructions(case: &str, total: usize) -> Option<f64> {
    let step = if case == "all_candidates" { 20 } else { 2_000 };
    let count = |decisions: usize| -> Option<f64> {
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg(std::env::current_exe().ok()?)
            .args(["--count", case, &total.to_string(), &decisions.to_string()])
            .output()
            .ok()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        said.lines().find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok())
    };
    // Valgrind runs the compilation fifty times slower, so the largest law is left to the clock.
    (total <= 1_000).then(|| Some((count(2 * step)? - count(step)?) / step as f64)).flatten()
}
