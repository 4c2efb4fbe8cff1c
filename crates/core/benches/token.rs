//! What an access token costs: to its issuer once in five minutes, and to a sidecar at each request.
//!
//! | case | is |
//! |---|---|
//! | `sign` | one made: the claims as JSON, and ES256 |
//! | `verify` | one seen for the first time: parsed, verified, held against its service and the time |
//! | `signature` | the peer: nothing but the signature of it, by the same library |
//! | `again` | the same on the same connection: held against the certificate, the clock, revocations and its scope |
//!
//! `again` is measured with as many revocations that hold as the second column says. Prints a table, and one JSON object on its last line.

mod support;

use std::{collections::BTreeMap, hint::black_box};

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{
        ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _, UnparsedPublicKey,
    },
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use countersign_core::{
    identity::SpiffeId,
    jws::Key,
    policy::Action,
    signal::{Signal, SignalSeq, Signals, TokenRevocation, TokensMeant},
    token::{Authorities, Claims, Thumbprint, TokenId, verify},
};
use serde_json::json;
use support::measure;

const NOW: i64 = 1_790_000_000;
const REVOKED: [u64; 3] = [0, 1_000, 100_000];

fn main() {
    let mut results: BTreeMap<String, BTreeMap<String, f64>> = BTreeMap::new();
    println!("{:>12} {:>10} {:>14}", "case", "revoked", "ns");
    let mut say = |case: &str, revoked: u64, nanoseconds: f64| {
        println!("{case:>12} {revoked:>10} {nanoseconds:>14.0}");
        results.entry(format!("{case}_ns")).or_default().insert(revoked.to_string(), nanoseconds.round());
    };
    let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).expect("a key of P-256");
    let public = pair.public_key().as_ref().to_vec();
    let authorities = Authorities {
        issuer: "https://shop.example".into(),
        keys: vec![Key::p256("one", &public).expect("a point of P-256")],
    };
    let (audience, claims) = (id("orders"), claims());
    let token = sign(&pair, &claims);
    say("sign", 0, measure(|| drop(black_box(sign(&pair, black_box(&claims))))));
    say("verify", 0, measure(|| drop(black_box(verify(black_box(&token), &authorities, &audience, NOW)))));
    let (input, signature) = token.rsplit_once('.').expect("three parts");
    let signature = URL_SAFE_NO_PAD.decode(signature).expect("base64url");
    let key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &public);
    say(
        "signature",
        0,
        measure(|| black_box(key.verify(black_box(input.as_bytes()), &signature)).expect("it is good")),
    );

    let verified = verify(&token, &authorities, &audience, NOW).unwrap_or_else(|fault| panic!("{fault:?}"));
    let (peer, certificate) = (id("web"), Thumbprint([1; 32]));
    for count in REVOKED {
        let signals = revoked(count);
        let again = || {
            let fault = verified.fault_of(black_box(&peer), &certificate, NOW);
            let is_good = fault.is_none() && !signals.is_token_revoked(verified.claims());
            is_good && verified.claims().scope.covers(Some("createCharge"), Action::Http("POST"))
        };
        assert!(again());
        say("again", count, measure(|| _ = black_box(again())));
    }
    println!("{}", serde_json::to_string(&results).expect("numbers by name"));
}

fn id(path: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://shop.example/{path}")).expect("a SPIFFE ID")
}

fn claims() -> Claims {
    let first = TokenId::new(NOW as u64 * 1000, [7; 10]);
    let claims = json!({
        "iss": "https://shop.example", "sub": id("web"), "aud": id("orders"), "client_id": id("web"),
        "iat": NOW, "exp": NOW + 300, "jti": first, "family": first, "instance": "web/1-7bb12d90",
        "scope": "cancelOrder createCharge listCharges refund showCharge", "cnf": { "x5t#S256": Thumbprint([1; 32]) },
    });
    serde_json::from_value(claims).expect("the claims of an access token")
}

fn sign(pair: &EcdsaKeyPair, claims: &Claims) -> String {
    let part = |bytes: Vec<u8>| URL_SAFE_NO_PAD.encode(bytes);
    let header = json!({ "alg": "ES256", "kid": "one", "typ": "at+jwt" }).to_string();
    let input = format!("{}.{}", part(header.into()), part(serde_json::to_vec(claims).expect("plain JSON")));
    let signature = pair.sign(&SystemRandom::new(), input.as_bytes()).expect("a key of P-256 signs");
    format!("{input}.{}", part(signature.as_ref().to_vec()))
}

/// So many tokens of others that were revoked.
fn revoked(count: u64) -> Signals {
    let one = |n: u64| {
        let issued_until_ms = NOW as u64 * 1000;
        let meant = TokensMeant::Id(TokenId::new(issued_until_ms - n, [9; 10]));
        Signal::Tokens(TokenRevocation { meant, issued_until_ms, expires_at_ms: issued_until_ms + 300_000 })
    };
    let mut signals = Signals::default();
    signals.welcome(SignalSeq(count), (0..count).map(one));
    signals
}
