//! What a sidecar and the control plane tell, as OTLP spans with the attributes of OpenTelemetry's semantic conventions for
//! HTTP and RPC, and under `countersign.` what only a mesh that judges has to say.

use countersign_api::sidecar::Span as Told;
use countersign_control::Changed;
use opentelemetry_proto::tonic::trace::v1::{Span, SpanFlags, Status, span::SpanKind, status::StatusCode};

use super::resource::{number, text, texts};

// RFC 9110, section 9, and RFC 5789: every other method is told as `_OTHER`, so that nobody who calls can invent names.
const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];
/// Longest name of a gRPC method that becomes the name of a span.
const RPC_NAME_BYTES_MAX: usize = 128;

/// An exchange: CLIENT where it left the caller's workload, SERVER where it was judged.
pub fn of_exchange(told: Told) -> Span {
    let is_client = !told.inbound;
    let known = METHODS.contains(&told.method.as_str());
    let method = if known { told.method.as_str() } else { "_OTHER" };
    let rpc = if told.protocol == "grpc" { rpc(&told.path) } else { None };
    let mut name = if known { method } else { "HTTP" }.to_owned();
    let mut attributes = Vec::with_capacity(20);
    if !told.method.is_empty() {
        attributes.push(text("http.request.method", method.into()));
        if !known {
            attributes.push(text("http.request.method_original", told.method.chars().take(64).collect()));
        }
    }
    match told.protocol.as_str() {
        "tcp" => {
            name = "tcp".into();
            attributes.push(text("network.transport", "tcp".into()));
        }
        "grpc" => {
            attributes.push(text("rpc.system", "grpc".into()));
            name = "grpc".into();
            if let Some((service, method)) = rpc {
                name = format!("{service}/{method}");
                attributes.extend([text("rpc.service", service.into()), text("rpc.method", method.into())]);
            }
        }
        _ => {}
    }
    if !told.service.is_empty() {
        attributes.push(text("server.address", format!("{}.mesh", told.service)));
        if is_client && !told.path.is_empty() && told.protocol != "tcp" {
            // Without its query, which may be anything.
            attributes.push(text("url.full", format!("http://{}.mesh{}", told.service, told.path)));
        }
    }
    if !told.path.is_empty() && told.protocol != "tcp" {
        attributes.extend([text("url.path", told.path), text("url.scheme", "http".into())]);
    }
    if !told.origin.is_empty() {
        attributes.push(text("client.address", told.origin));
    }
    if told.status != 0 {
        attributes.push(number("http.response.status_code", told.status));
    }
    // A caller's mistake is an error of the caller alone (semantic conventions for HTTP spans, status).
    let failed = told.status >= if is_client { 400 } else { 500 } || told.end != "completed";
    if failed {
        let why = match (told.refusal.as_str(), told.end.as_str()) {
            ("", "completed") => told.status.to_string(),
            ("", end) => end.to_owned(),
            (refusal, _) => refusal.to_owned(),
        };
        attributes.push(text("error.type", why));
    }
    if !told.refusal.is_empty() {
        attributes.push(text("countersign.refusal", told.refusal));
    }
    attributes.push(text("countersign.end", told.end));
    if let Some(decision) = told.decision {
        attributes.extend([
            text("countersign.decision.id", decision.id),
            text("countersign.decision.outcome", decision.outcome),
            text("countersign.decision.reason", decision.reason),
            texts("countersign.decision.policies", decision.policies),
            number("countersign.revision", decision.revision),
            text("countersign.caller", decision.caller),
        ]);
        if !decision.operation.is_empty() {
            attributes.push(text("countersign.operation", decision.operation));
        }
    }
    let parent = told.parent_id != 0;
    let remote = SpanFlags::ContextHasIsRemoteMask as u32 | SpanFlags::ContextIsRemoteMask as u32;
    Span {
        trace_id: told.trace_id.to_vec(),
        span_id: told.span_id.to_be_bytes().to_vec(),
        parent_span_id: if parent { told.parent_id.to_be_bytes().to_vec() } else { Vec::new() },
        flags: 1 | if parent { remote } else { 0 },
        name,
        kind: if is_client { SpanKind::Client } else { SpanKind::Server } as i32,
        start_time_unix_nano: told.began_ns,
        end_time_unix_nano: told.began_ns.saturating_add(told.duration_ns),
        attributes,
        status: failed.then(|| Status { code: StatusCode::Error as i32, message: String::new() }),
        ..Span::default()
    }
}

/// A change-set that was admitted: a trace of its own.
pub fn of_change(changed: Changed, trace_id: u128, span_id: u64) -> Span {
    let began_ns = changed.asked_at_ms.saturating_mul(1_000_000);
    Span {
        trace_id: trace_id.to_be_bytes().to_vec(),
        span_id: span_id.to_be_bytes().to_vec(),
        flags: 1,
        name: "change".into(),
        kind: SpanKind::Internal as i32,
        start_time_unix_nano: began_ns,
        end_time_unix_nano: began_ns.saturating_add(changed.took.as_nanos() as u64),
        attributes: vec![
            number("countersign.revision", changed.revision.0),
            text("countersign.change.digest", changed.digest),
            text("countersign.change.actor", changed.actor),
            number("countersign.change.count", changed.change_count),
        ],
        ..Span::default()
    }
}

/// `/package.Service/Method`, if it is one: anything else could be a name for each call.
fn rpc(path: &str) -> Option<(&str, &str)> {
    let is_name =
        |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.'));
    let (service, method) = path.strip_prefix('/')?.split_once('/')?;
    (path.len() <= RPC_NAME_BYTES_MAX && is_name(service) && is_name(method)).then_some((service, method))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use countersign_api::sidecar::SpanDecision;
    use opentelemetry_proto::tonic::common::v1::any_value::Value;

    use super::*;

    fn told() -> Told {
        Told {
            trace_id: vec![7; 16].into(),
            span_id: 2,
            parent_id: 1,
            began_ns: 100,
            duration_ns: 5,
            protocol: "http".into(),
            method: "GET".into(),
            path: "/items/1".into(),
            service: "catalog".into(),
            status: 200,
            end: "completed".into(),
            ..Told::default()
        }
    }

    fn shown(span: &Span) -> BTreeMap<&str, String> {
        let value = |attribute: &Value| match attribute {
            Value::StringValue(text) => text.clone(),
            Value::IntValue(number) => number.to_string(),
            other => format!("{other:?}"),
        };
        span.attributes
            .iter()
            .map(|attribute| (attribute.key.as_str(), value(attribute.value.as_ref().unwrap().value.as_ref().unwrap())))
            .collect()
    }

    #[test]
    fn the_callers_side_is_a_client_and_the_callees_a_server_with_the_decision() {
        let client = of_exchange(told());
        assert_eq!((client.kind, client.name.as_str()), (SpanKind::Client as i32, "GET"));
        assert_eq!(client.parent_span_id, 1u64.to_be_bytes());
        assert_eq!(client.end_time_unix_nano, 105);
        let of_client = shown(&client);
        assert_eq!(of_client["url.full"], "http://catalog.mesh/items/1");
        assert!(!of_client.contains_key("error.type") && client.status.is_none());

        let decision = SpanDecision {
            id: "0d".into(),
            outcome: "deny".into(),
            reason: "forbidden".into(),
            revision: 3,
            policies: vec!["p".into()],
            caller: "spiffe://shop.example/web".into(),
            operation: "removeItem".into(),
        };
        let denied = Told { inbound: true, status: 403, refusal: "denied".into(), decision: Some(decision), ..told() };
        let server = of_exchange(denied);
        let of_server = shown(&server);
        assert_eq!(server.kind, SpanKind::Server as i32);
        for (key, value) in [
            ("http.request.method", "GET"),
            ("url.path", "/items/1"),
            ("http.response.status_code", "403"),
            ("countersign.decision.id", "0d"),
            ("countersign.decision.outcome", "deny"),
            ("countersign.decision.reason", "forbidden"),
            ("countersign.revision", "3"),
            ("countersign.caller", "spiffe://shop.example/web"),
            ("countersign.operation", "removeItem"),
            ("countersign.refusal", "denied"),
        ] {
            assert_eq!(of_server[key], value, "{key}");
        }
        assert!(of_server["countersign.decision.policies"].contains("\"p\""));
        assert!(server.status.is_none(), "the server did what it should");
    }

    #[test]
    fn an_error_is_one_for_the_side_that_has_it() {
        for (inbound, status, refusal, end, error) in [
            (false, 200, "", "completed", None),
            (false, 404, "", "completed", Some("404")),
            (false, 404, "unknown_service", "completed", Some("unknown_service")),
            (true, 404, "", "completed", None),
            (true, 503, "", "completed", Some("503")),
            (true, 200, "", "cut", Some("cut")),
            (false, 0, "", "abandoned", Some("abandoned")),
        ] {
            let (refusal, end) = (refusal.to_owned(), end.to_owned());
            let span = of_exchange(Told { inbound, status, refusal, end, ..told() });
            assert_eq!(shown(&span).get("error.type").map(String::as_str), error, "{inbound} {status}");
            assert_eq!(span.status.is_some(), error.is_some());
        }
    }

    #[test]
    fn a_name_is_never_the_callers_invention() {
        for (protocol, method, path, name) in [
            ("http", "POST", "/any", "POST"),
            ("http", "BREW", "/pot", "HTTP"),
            ("http", "", "", "HTTP"),
            ("grpc", "POST", "/shop.Greeter/Hello", "shop.Greeter/Hello"),
            ("grpc", "POST", "/shop.Greeter/Hello/7", "grpc"),
            ("grpc", "POST", "/shop.Greeter/%20", "grpc"),
            ("grpc", "POST", "/", "grpc"),
            ("tcp", "CONNECT", "/", "tcp"),
        ] {
            let (protocol, method, path) = (protocol.to_owned(), method.to_owned(), path.to_owned());
            assert_eq!(of_exchange(Told { protocol, method, path, ..told() }).name, name);
        }
    }
}
