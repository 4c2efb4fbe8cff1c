//! An event as a document of the Open Cybersecurity Schema Framework: its classes and names, of version 1.5. What the schema has no
//! place for stands in `unmapped`.

use serde_json::{Map, Value, json};

use countersign_core::gate::act::Act;

use super::{By, Event, From, How, Identity};

/// The version of the schema whose names these are.
const SCHEMA: &str = "1.5.0";

/// A class of events, and what can happen in it.
struct Class {
    uid: u32,
    name: &'static str,
    category: &'static str,
}

const ACCOUNT_CHANGE: Class = Class { uid: 3001, name: "Account Change", category: "Identity & Access Management" };
const AUTHENTICATION: Class = Class { uid: 3002, name: "Authentication", category: "Identity & Access Management" };
const ENTITY_MANAGEMENT: Class =
    Class { uid: 3004, name: "Entity Management", category: "Identity & Access Management" };
const USER_ACCESS: Class =
    Class { uid: 3005, name: "User Access Management", category: "Identity & Access Management" };
const LIFECYCLE: Class = Class { uid: 6002, name: "Application Lifecycle", category: "Application Activity" };
const API_ACTIVITY: Class = Class { uid: 6003, name: "API Activity", category: "Application Activity" };

/// What happened, in the words of the schema.
struct Told {
    class: Class,
    activity: (u32, &'static str),
    severity: Severity,
    /// Why it failed; nothing where it did not.
    failed: Option<String>,
    message: &'static str,
    members: Value,
    unmapped: Value,
}

#[derive(Clone, Copy)]
enum Severity {
    Informational,
    Low,
    High,
}

/// The document of `event`, which happened at `at_ms` and is the `sequence`th that this process writes.
pub(super) fn event(event: &Event, at_ms: u64, sequence: u64) -> Value {
    let Told { class, activity, severity, failed, message, members, unmapped } = told(event);
    let severity = match severity {
        Severity::Informational => (1, "Informational"),
        Severity::Low => (2, "Low"),
        Severity::High => (4, "High"),
    };
    let status = if failed.is_some() { (2, "Failure") } else { (1, "Success") };
    let mut document = json!({
        "time": at_ms,
        "class_uid": class.uid,
        "class_name": class.name,
        "category_uid": class.uid / 1000,
        "category_name": class.category,
        "activity_id": activity.0,
        "activity_name": activity.1,
        "type_uid": class.uid * 100 + activity.0,
        "type_name": format!("{}: {}", class.name, activity.1),
        "severity_id": severity.0,
        "severity": severity.1,
        "status_id": status.0,
        "status": status.1,
        "message": message,
        "metadata": {
            "version": SCHEMA,
            "sequence": sequence,
            "product": { "name": "Countersign", "vendor_name": "Countersign", "version": env!("CARGO_PKG_VERSION") },
        },
    });
    let into = document.as_object_mut().expect("INVARIANT: it is an object");
    into.extend(failed.map(|why| ("status_detail".to_owned(), why.into())));
    if let Value::Object(members) = members {
        into.extend(members);
    }
    if unmapped.as_object().is_some_and(|members| !members.is_empty()) {
        into.insert("unmapped".to_owned(), unmapped);
    }
    document
}

fn told(event: &Event) -> Told {
    match event {
        Event::Started => plain(LIFECYCLE, (3, "Start"), "the control plane started", app()),
        Event::Stopped => plain(LIFECYCLE, (4, "Stop"), "the control plane stopped", app()),
        Event::Lost { count } => Told {
            severity: Severity::High,
            unmapped: json!({ "events_lost": count }),
            ..plain(LIFECYCLE, (99, "Other"), "events could not be written", app())
        },
        Event::TelemetrySilent { instance, host, since_ms } => Told {
            severity: Severity::High,
            unmapped: json!({ "instance": instance, "host": host, "silent_since": since_ms }),
            ..plain(LIFECYCLE, (99, "Other"), "the telemetry of a sidecar is silent", app())
        },
        Event::SignedIn { who, session, with, address, held_by } => Told {
            unmapped: json!({ "factor": with, "held_by": held_by }),
            ..plain(
                AUTHENTICATION,
                (1, "Logon"),
                if *with == "provider" { "somebody signed in with a provider" } else { "an operator signed in" },
                json!({
                    "user": user(who),
                    "session": { "uid": session },
                    "src_endpoint": { "ip": address },
                    "service": service(),
                    "is_remote": true,
                }),
            )
        },
        Event::SignInRefused { who, address, why } => Told {
            severity: Severity::Low,
            failed: Some(why.clone()),
            ..plain(
                AUTHENTICATION,
                (1, "Logon"),
                "a sign-in was refused",
                json!({
                    // A name that a stranger gave: there need be no such operator.
                    "user": user(who.as_deref().unwrap_or("unknown")),
                    "src_endpoint": { "ip": address },
                    "service": service(),
                    "is_remote": true,
                }),
            )
        },
        Event::SignedOut { who, session, by } => plain(
            AUTHENTICATION,
            (2, "Logoff"),
            "a session was ended",
            json!({
                "user": user(who),
                "session": { "uid": session },
                "service": service(),
                "actor": match by {
                    By::SignedIn(by) | By::Provider(by) => json!({ "user": user(by) }),
                    By::Socket => socket(),
                },
            }),
        ),
        Event::FactorRefused { operator, factor, why } => Told {
            severity: Severity::Low,
            failed: Some(why.clone()),
            unmapped: json!({ "factor": factor.as_str() }),
            ..plain(
                AUTHENTICATION,
                (99, "Other"),
                "what an operator showed was refused",
                json!({ "user": user(operator), "service": service() }),
            )
        },
        Event::KeyCloned { operator } => Told {
            severity: Severity::High,
            failed: Some("its count of signatures did not rise".to_owned()),
            ..plain(
                AUTHENTICATION,
                (99, "Other"),
                "a key may have been cloned",
                json!({ "user": user(operator), "service": service() }),
            )
        },
        Event::OperatorChanged { operator, how, by, revision } => of_operator(operator, how, by, *revision),
        Event::Passed { operator, act, from } => {
            plain(API_ACTIVITY, activity_of(*act), "an act passed the gate", asked(operator, *act, from))
        }
        Event::NotPassed { who, act, from, why } => Told {
            severity: Severity::Low,
            failed: Some(why.clone()),
            ..plain(API_ACTIVITY, activity_of(*act), "an act was not let pass", asked(who, *act, from))
        },
        Event::Changed { actor, revision, digest, kinds } => Told {
            unmapped: json!({ "revision": revision, "digest": digest, "changes": kinds }),
            ..plain(API_ACTIVITY, (3, "Update"), "a change was applied", change(actor))
        },
        Event::ChangeDenied { actor, digest, why } => Told {
            severity: Severity::Low,
            failed: Some(why.clone()),
            unmapped: json!({ "digest": digest }),
            ..plain(API_ACTIVITY, (3, "Update"), "the change gate denied a change", change(actor))
        },
        Event::Recovered { operator, reason, revision } => Told {
            severity: Severity::High,
            unmapped: json!({ "reason": reason, "revision": revision }),
            ..plain(
                USER_ACCESS,
                (3, "Assign Role"),
                "the mesh was recovered past its gate",
                json!({ "user": user(operator), "actor": socket(), "iam_role": { "name": "owner" } }),
            )
        },
        Event::Issued { what, name, host, expires_at_ms } => {
            let kind = match what {
                Identity::Workload => "X.509-SVID of a workload",
                Identity::Jwt => "JWT-SVID of a workload",
                Identity::Agent => "X.509-SVID of an agent",
            };
            Told {
                unmapped: json!({ "expires_at": expires_at_ms }),
                ..plain(
                    ENTITY_MANAGEMENT,
                    (1, "Create"),
                    "an identity was issued",
                    json!({ "entity": { "name": name, "type": kind }, "actor": { "app_name": format!("agent on {host}") } }),
                )
            }
        }
        Event::Revoked { by, reason, signal, count, names } => Told {
            severity: Severity::High,
            unmapped: json!({ "reason": reason, "signal": signal, "count": count, "identities": names }),
            ..plain(
                ENTITY_MANAGEMENT,
                (4, "Delete"),
                "identities were revoked",
                json!({ "entity": { "name": names.first(), "type": "identity" }, "actor": { "user": user(by) } }),
            )
        },
        Event::AuthorityStepped { by, step, number, sha256, cut } => Told {
            severity: Severity::High,
            unmapped: json!({ "step": step, "root": number, "cut": cut }),
            ..plain(
                ENTITY_MANAGEMENT,
                (3, "Update"),
                "a root of the trust domain moved on",
                json!({
                    "entity": { "name": sha256.to_string(), "type": "root certificate" },
                    "actor": { "user": user(by) },
                }),
            )
        },
        Event::KeyReplaced { by, keys, key_id, compromised } => Told {
            severity: Severity::High,
            unmapped: json!({ "keys": keys, "compromised": compromised }),
            ..plain(
                ENTITY_MANAGEMENT,
                (3, "Update"),
                "another key signs tokens",
                json!({ "entity": { "name": key_id, "type": "signing key" }, "actor": { "user": user(by) } }),
            )
        },
        Event::TokensRevoked { by, reason, signal, meant } => Told {
            severity: Severity::High,
            unmapped: json!({ "reason": reason, "signal": signal }),
            ..plain(
                ENTITY_MANAGEMENT,
                (4, "Delete"),
                "access tokens were revoked",
                json!({ "entity": { "name": meant, "type": "access token" }, "actor": { "user": user(by) } }),
            )
        },
        Event::Stated { by, reason, signal, subject, kind, value } => Told {
            severity: Severity::Low,
            unmapped: json!({ "reason": reason, "signal": signal, "kind": kind, "value": value }),
            ..plain(
                ENTITY_MANAGEMENT,
                (3, "Update"),
                "a signal was sent",
                json!({ "entity": { "name": subject, "type": "subject of signals" }, "actor": { "user": user(by) } }),
            )
        },
        Event::TokenStolen { id, subject, shown_by, origin, fault, decision } => Told {
            severity: Severity::High,
            failed: Some(format!("the token is not of whoever showed it: {fault}")),
            unmapped: json!({ "fault": fault, "decision": decision, "subject": subject, "origin": origin }),
            ..plain(
                ENTITY_MANAGEMENT,
                (2, "Read"),
                "a stolen access token was shown",
                json!({ "entity": { "name": id, "type": "access token" }, "actor": { "app_name": shown_by } }),
            )
        },
        Event::JoinTokenReused { host, evicted } => Told {
            severity: Severity::High,
            failed: Some("it was used before: whoever used it first may not be who was invited".to_owned()),
            unmapped: json!({ "evicted": evicted }),
            ..plain(
                ENTITY_MANAGEMENT,
                (1, "Create"),
                "a join token was shown a second time",
                json!({ "entity": { "name": host, "type": "host" } }),
            )
        },
        Event::HostEvicted { by, reason, host, identities } => Told {
            severity: Severity::High,
            unmapped: json!({ "reason": reason, "identities": identities }),
            ..plain(
                ENTITY_MANAGEMENT,
                (4, "Delete"),
                "a host was evicted",
                json!({ "entity": { "name": host, "type": "host" }, "actor": { "user": user(by) } }),
            )
        },
    }
}

fn of_operator(operator: impl ToString, how: &How, by: &str, revision: u64) -> Told {
    let (class, activity, message, unmapped) = match how {
        How::Invited(roles) => (ACCOUNT_CHANGE, (1, "Create"), "an operator was invited", json!({ "roles": roles })),
        How::RolesSet(roles) => {
            (USER_ACCESS, (3, "Assign Role"), "an operator's roles were set", json!({ "roles": roles }))
        }
        How::Removed => (ACCOUNT_CHANGE, (6, "Delete"), "an operator was removed", json!({})),
        How::FactorAdded(id, kind) => (
            ACCOUNT_CHANGE,
            (10, "MFA Factor Enable"),
            "an operator enrolled a factor",
            json!({ "factor": kind.as_str(), "factor_uid": id.as_str() }),
        ),
        How::FactorRemoved(id) => {
            (ACCOUNT_CHANGE, (11, "MFA Factor Disable"), "a factor was removed", json!({ "factor_uid": id.as_str() }))
        }
    };
    let mut unmapped = unmapped;
    unmapped["revision"] = revision.into();
    let mut members = json!({ "user": user(operator), "actor": { "user": user(by) } });
    if let How::RolesSet(roles) = how {
        members["iam_role"] = json!({ "name": roles.join(", ") });
    }
    Told { unmapped, ..plain(class, activity, message, members) }
}

/// What succeeded and worries nobody.
fn plain(class: Class, activity: (u32, &'static str), message: &'static str, members: Value) -> Told {
    let unmapped = Value::Object(Map::new());
    Told { class, activity, severity: Severity::Informational, failed: None, message, members, unmapped }
}

fn activity_of(act: Act) -> (u32, &'static str) {
    match act {
        Act::ReadLedger | Act::ReadDecisions | Act::ExportLedger | Act::ReadTokens | Act::ReadSignals => (2, "Read"),
        Act::InviteHost => (1, "Create"),
        Act::RevokeIdentity | Act::RevokeToken | Act::EvictHost => (4, "Delete"),
        Act::RotateAuthority | Act::SendSignal => (3, "Update"),
    }
}

fn asked(operator: impl ToString, act: Act, from: &From) -> Value {
    let mut actor = json!({ "user": user(operator) });
    let source = match from {
        From::Socket => json!({ "name": "the control plane's socket" }),
        From::Session { address, session } => {
            actor["session"] = json!({ "uid": session });
            json!({ "ip": address })
        }
    };
    json!({ "actor": actor, "api": { "operation": act.as_str() }, "src_endpoint": source })
}

fn change(actor: &str) -> Value {
    json!({
        "actor": { "user": user(actor) },
        "api": { "operation": "apply" },
        "src_endpoint": { "name": "the control plane" },
    })
}

fn user(name: impl ToString) -> Value {
    json!({ "name": name.to_string() })
}

fn socket() -> Value {
    json!({ "user": { "name": "the mesh's own user" } })
}

fn service() -> Value {
    json!({ "name": "countersign" })
}

fn app() -> Value {
    json!({ "app": { "name": "Countersign control plane", "version": env!("CARGO_PKG_VERSION") } })
}
