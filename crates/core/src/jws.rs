//! A signed token taken apart (RFC 7515, compact form), and the keys that verify it.
//!
//! The algorithm has to be one of four, and the one of the key: `none` and every MAC are no words here. Keys, addresses of keys
//! and certificates that a header brings are not looked at. A document that says something twice says nothing.

use std::fmt;

use aws_lc_rs::signature::{self, RsaPublicKeyComponents, UnparsedPublicKey};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Value};

use crate::canonical::Digest;

/// Longest token that is looked at, in bytes.
pub const TOKEN_BYTES_MAX: usize = 16 * 1024;
/// The `typ` of a proof of a key.
pub const PROOF_TYP: &str = "dpop+jwt";
/// Longest name of a key, in bytes.
const KEY_ID_BYTES_MAX: usize = 512;
/// Smallest and largest modulus of an RSA key, in bytes.
const RSA_BYTES: std::ops::RangeInclusive<usize> = 256..=1024;

/// How a token is signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// ECDSA with P-256.
    Es256,
    /// RSA, PKCS #1 1.5.
    Rs256,
    /// RSA-PSS.
    Ps256,
    /// Ed25519.
    EdDsa,
}

/// What kind of token one has to be, as the `typ` of its header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Typ {
    /// A token about somebody: `JWT`, or nothing.
    Token,
    /// A token by which a provider ends sessions: `logout+jwt`, `JWT`, or nothing (OpenID Connect Back-Channel Logout 1.0, 2.4). What it
    /// says tells it from one about somebody.
    Logout,
    /// A proof of a key (RFC 9449), which brings that key.
    Proof,
    /// An access token: `at+jwt`, with or without `application/` (RFC 9068, 2.1).
    Access,
    /// A JWT-SVID: `JWT`, `JOSE`, or nothing; and nothing else in its header than that, `alg` and `kid` (JWT-SVID, 2).
    Svid,
}

/// Why something is no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenMalformed {
    /// It is too long.
    #[error("a token has at most {TOKEN_BYTES_MAX} bytes")]
    TooLong,
    /// It does not have three parts of base64url.
    #[error("it is no signed token: three parts of base64url, with a dot between")]
    Parts,
    /// A part is no JSON object, or says something twice.
    #[error("its {part} cannot be read: {why}")]
    Json {
        /// Which part.
        part: &'static str,
        /// Why.
        why: String,
    },
    /// Its header asks for what is not taken.
    #[error("its header is not taken: {0}")]
    Header(String),
    /// It does not say who issued it.
    #[error("it does not say who issued it")]
    NoIssuer,
}

/// A token as it came. Nothing in it is true yet.
#[derive(Debug)]
pub struct Presented<'t> {
    algorithm: Algorithm,
    key_id: Option<String>,
    /// The key that a proof brings. Whose it is, it does not say.
    own_key: Option<Value>,
    claims: Map<String, Value>,
    signing_input: &'t str,
    signature: Vec<u8>,
}

/// A public key of an issuer.
#[derive(Debug, Clone)]
pub struct Key {
    id: Option<String>,
    algorithm: Option<Algorithm>,
    material: Material,
}

#[derive(Debug, Clone)]
enum Material {
    P256(Vec<u8>),
    Ed25519(Vec<u8>),
    Rsa { n: Vec<u8>, e: Vec<u8> },
}

impl Algorithm {
    fn parse(given: &str) -> Option<Self> {
        Some(match given {
            "ES256" => Self::Es256,
            "RS256" => Self::Rs256,
            "PS256" => Self::Ps256,
            "EdDSA" => Self::EdDsa,
            _ => return None,
        })
    }
}

impl<'t> Presented<'t> {
    /// Takes a token about somebody apart.
    pub fn parse(token: &'t str) -> Result<Self, TokenMalformed> {
        Self::parse_as(token, Typ::Token)
    }

    /// Takes a token of one kind apart.
    pub fn parse_as(token: &'t str, typ: Typ) -> Result<Self, TokenMalformed> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(TokenMalformed::TooLong);
        }
        let [header, payload, signature] = token.split('.').collect::<Vec<_>>()[..] else {
            return Err(TokenMalformed::Parts);
        };
        let decoded = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenMalformed::Parts);
        let (signing_input, signature) = (&token[..header.len() + 1 + payload.len()], decoded(signature)?);
        let header = object("header", &decoded(header)?)?;
        let claims = object("payload", &decoded(payload)?)?;
        let no = |what: String| Err(TokenMalformed::Header(what));
        let Some(Value::String(given)) = header.get("alg") else { return no("it names no `alg`".to_owned()) };
        let Some(algorithm) = Algorithm::parse(given) else {
            return no(format!("`alg` is `{}`", given.chars().take(40).collect::<String>()));
        };
        // "If any of the listed extension Header Parameters are not understood and supported by the recipient, then the JWS is
        // invalid" (RFC 7515, 4.1.11): none is.
        if header.contains_key("crit") || header.contains_key("b64") {
            return no("it demands extensions".to_owned());
        }
        let is_meant = match (typ, header.get("typ")) {
            (Typ::Token | Typ::Logout, None) => true,
            (Typ::Logout, Some(Value::String(said))) if said.eq_ignore_ascii_case("logout+jwt") => true,
            (Typ::Token | Typ::Logout, Some(said)) => {
                said.as_str().is_some_and(|said| said.eq_ignore_ascii_case("JWT"))
            }
            (Typ::Proof, said) => said.and_then(Value::as_str) == Some(PROOF_TYP),
            (Typ::Access, said) => said.and_then(Value::as_str).is_some_and(|said| {
                // "The 'application/' prefix may be omitted" (RFC 7515, 4.1.9); media types know no case.
                ["at+jwt", "application/at+jwt"].iter().any(|typ| said.eq_ignore_ascii_case(typ))
            }),
            (Typ::Svid, None) => true,
            (Typ::Svid, Some(said)) => matches!(said.as_str(), Some("JWT" | "JOSE")),
        };
        if !is_meant {
            return no("its `typ` is of another kind of token".to_owned());
        }
        if typ == Typ::Svid
            && let Some(other) = header.keys().find(|name| !matches!(name.as_str(), "alg" | "kid" | "typ"))
        {
            return no(format!("a JWT-SVID has no `{}` there", other.chars().take(40).collect::<String>()));
        }
        let key_id = match header.get("kid") {
            None => None,
            Some(Value::String(id)) if id.len() <= KEY_ID_BYTES_MAX => Some(id.clone()),
            Some(_) => return no("its `kid` is no short text".to_owned()),
        };
        let own_key = if typ == Typ::Proof { header.get("jwk").cloned() } else { None };
        Ok(Self { algorithm, key_id, own_key, claims, signing_input, signature })
    }

    /// The thumbprint of the key that a proof brings, if that key signed it: ECDSA with P-256, and nothing private in it.
    pub fn proven_key(&self) -> Option<String> {
        let jwk = self.own_key.as_ref()?;
        let key = Key::of_jwk(jwk).filter(|_| jwk.get("d").is_none() && self.algorithm == Algorithm::Es256)?;
        let coordinate = |name: &str| jwk.get(name).and_then(Value::as_str).map(str::to_owned);
        (matches!(key.material, Material::P256(_)) && key.verifies(self))
            .then(|| Some(thumbprint(&(coordinate("x")?, coordinate("y")?))))?
    }

    /// Who is said to have issued it.
    pub fn issuer(&self) -> Result<&str, TokenMalformed> {
        self.claims.get("iss").and_then(Value::as_str).ok_or(TokenMalformed::NoIssuer)
    }

    /// Whom it is said to be about.
    pub fn subject(&self) -> Option<&str> {
        self.claims.get("sub").and_then(Value::as_str)
    }

    /// Which key is said to have signed it.
    pub fn key_id(&self) -> Option<&str> {
        self.key_id.as_deref()
    }

    /// The claims, and what tells the token from others. To be asked for once a key has verified it. An ECDSA signature has a
    /// twin that is as good, so the signature is no part of it.
    pub fn into_signed(self) -> (Map<String, Value>, Digest) {
        let id = Digest::of(self.signing_input.as_bytes());
        (self.claims, id)
    }
}

impl Key {
    /// The key of P-256 with this uncompressed point, which verifies ES256.
    pub fn p256(id: &str, point: &[u8]) -> Option<Self> {
        (point.len() == 65 && point[0] == 4).then(|| Self {
            id: Some(id.to_owned()),
            algorithm: Some(Algorithm::Es256),
            material: Material::P256(point.to_vec()),
        })
    }

    /// Reads the keys of a JWK set (RFC 7517); those that are for something else, or of another kind, are passed over.
    pub fn of_set(bytes: &[u8], keys_max: usize) -> Result<Vec<Self>, String> {
        let set = object("key set", bytes).map_err(|error| error.to_string())?;
        let keys = set.get("keys").and_then(Value::as_array).ok_or("it has no `keys`")?;
        if keys.len() > keys_max {
            return Err(format!("it has more than {keys_max} keys"));
        }
        Ok(keys.iter().filter_map(Self::of_jwk).collect())
    }

    /// Reads a key (RFC 7517); `None` when it verifies nothing here.
    pub fn of_jwk(jwk: &Value) -> Option<Self> {
        let member = |name: &str| jwk.get(name).and_then(Value::as_str);
        let bytes = |name: &str| member(name).and_then(|text| URL_SAFE_NO_PAD.decode(text).ok());
        if member("use").is_some_and(|used| used != "sig") {
            return None;
        }
        if let Some(operations) = jwk.get("key_ops").and_then(Value::as_array)
            && !operations.iter().any(|operation| operation == "verify")
        {
            return None;
        }
        let material = match (member("kty")?, member("crv")) {
            ("EC", Some("P-256")) => {
                let (x, y) = (bytes("x")?, bytes("y")?);
                (x.len() == 32 && y.len() == 32).then(|| Material::P256([&[4][..], &x, &y].concat()))?
            }
            ("OKP", Some("Ed25519")) => Material::Ed25519(bytes("x").filter(|x| x.len() == 32)?),
            ("RSA", _) => {
                let (n, e) = (bytes("n")?, bytes("e")?);
                RSA_BYTES.contains(&n.len()).then_some(Material::Rsa { n, e })?
            }
            _ => return None,
        };
        let algorithm = match jwk.get("alg") {
            None => None,
            Some(given) => Some(Algorithm::parse(given.as_str()?)?),
        };
        Some(Self { id: member("kid").map(str::to_owned), algorithm, material })
    }

    /// Whether it has this name.
    pub fn is_named(&self, id: &str) -> bool {
        self.id.as_deref() == Some(id)
    }

    /// Whether it signed the token, with an algorithm of its own.
    pub fn verifies(&self, token: &Presented<'_>) -> bool {
        if self.algorithm.is_some_and(|algorithm| algorithm != token.algorithm) {
            return false;
        }
        let (message, signed) = (token.signing_input.as_bytes(), &token.signature[..]);
        match (&self.material, token.algorithm) {
            (Material::P256(point), Algorithm::Es256) => {
                UnparsedPublicKey::new(&signature::ECDSA_P256_SHA256_FIXED, point).verify(message, signed).is_ok()
            }
            (Material::Ed25519(point), Algorithm::EdDsa) => {
                UnparsedPublicKey::new(&signature::ED25519, point).verify(message, signed).is_ok()
            }
            (Material::Rsa { n, e }, Algorithm::Rs256) => {
                RsaPublicKeyComponents { n, e }.verify(&signature::RSA_PKCS1_2048_8192_SHA256, message, signed).is_ok()
            }
            (Material::Rsa { n, e }, Algorithm::Ps256) => {
                RsaPublicKeyComponents { n, e }.verify(&signature::RSA_PSS_2048_8192_SHA256, message, signed).is_ok()
            }
            _ => false,
        }
    }
}

/// The thumbprint of a key of P-256 with these coordinates, as a JWK writes them (RFC 7638).
pub fn thumbprint((x, y): &(String, String)) -> String {
    let canonical = serde_json::json!({ "crv": "P-256", "kty": "EC", "x": x, "y": y });
    URL_SAFE_NO_PAD.encode(Digest::of_canonical(&canonical).0)
}

/// The coordinates of an uncompressed point of P-256, as a JWK writes them.
pub fn coordinates(point: &[u8]) -> (String, String) {
    (URL_SAFE_NO_PAD.encode(&point[1..33]), URL_SAFE_NO_PAD.encode(&point[33..65]))
}

/// A JSON object that says nothing twice, at any depth.
pub fn object(part: &'static str, bytes: &[u8]) -> Result<Map<String, Value>, TokenMalformed> {
    let said = |why: String| TokenMalformed::Json { part, why };
    match serde_json::from_slice::<Once>(bytes) {
        Ok(Once(Value::Object(object))) => Ok(object),
        Ok(_) => Err(said("it is no JSON object".to_owned())),
        Err(error) => Err(said(error.to_string())),
    }
}

/// A JSON value in which no object has a member twice.
struct Once(Value);

impl<'de> Deserialize<'de> for Once {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Reader).map(Self)
    }
}

struct Reader;

impl<'de> Visitor<'de> for Reader {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, given: bool) -> Result<Value, E> {
        Ok(given.into())
    }

    fn visit_i64<E>(self, given: i64) -> Result<Value, E> {
        Ok(given.into())
    }

    fn visit_u64<E>(self, given: u64) -> Result<Value, E> {
        Ok(given.into())
    }

    fn visit_f64<E>(self, given: f64) -> Result<Value, E> {
        Ok(given.into())
    }

    fn visit_str<E>(self, given: &str) -> Result<Value, E> {
        Ok(given.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut given: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(Once(value)) = given.next_element()? {
            array.push(value);
        }
        Ok(Value::Array(array))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut given: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(name) = given.next_key::<String>()? {
            let Once(value) = given.next_value()?;
            if object.contains_key(&name) {
                return Err(A::Error::custom(format_args!("`{name}` stands there twice")));
            }
            object.insert(name, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::{
        rand::SystemRandom,
        rsa::KeySize,
        signature::{EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RsaKeyPair},
    };
    use serde_json::json;

    use super::*;

    fn encode(bytes: impl AsRef<[u8]>) -> String {
        URL_SAFE_NO_PAD.encode(bytes)
    }

    fn token(header: &str, payload: &str, sign: impl Fn(&[u8]) -> Vec<u8>) -> String {
        let input = format!("{}.{}", encode(header), encode(payload));
        let signature = sign(input.as_bytes());
        format!("{input}.{}", encode(signature))
    }

    fn ec() -> (EcdsaKeyPair, Value) {
        let pair = EcdsaKeyPair::generate(&signature::ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
        let point = pair.public_key().as_ref();
        let jwk =
            json!({ "kty": "EC", "crv": "P-256", "kid": "ec", "x": encode(&point[1..33]), "y": encode(&point[33..]) });
        (pair, jwk)
    }

    fn key(jwk: &Value) -> Key {
        Key::of_jwk(jwk).unwrap()
    }

    #[test]
    fn each_algorithm_is_verified_by_a_key_of_its_own_kind_and_by_no_other() {
        let random = SystemRandom::new();
        let (ec, ec_jwk) = ec();
        let ed = Ed25519KeyPair::generate().unwrap();
        let ed_jwk = json!({ "kty": "OKP", "crv": "Ed25519", "x": encode(ed.public_key()) });
        let rsa = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
        let n = rsa.public_key().modulus().big_endian_without_leading_zero().to_vec();
        let e = rsa.public_key().exponent().big_endian_without_leading_zero().to_vec();
        let rsa_jwk = json!({ "kty": "RSA", "n": encode(n), "e": encode(e) });
        let rsa_signs = |padding: &'static dyn aws_lc_rs::signature::RsaEncoding, message: &[u8]| {
            let mut signature = vec![0; rsa.public_modulus_len()];
            rsa.sign(padding, &random, message, &mut signature).unwrap();
            signature
        };
        let sign = |algorithm: &str, message: &[u8]| match algorithm {
            "ES256" => ec.sign(&random, message).unwrap().as_ref().to_vec(),
            "EdDSA" => ed.sign(message).as_ref().to_vec(),
            "RS256" => rsa_signs(&signature::RSA_PKCS1_SHA256, message),
            _ => rsa_signs(&signature::RSA_PSS_SHA256, message),
        };
        let keys = [("ES256", &ec_jwk), ("EdDSA", &ed_jwk), ("RS256", &rsa_jwk), ("PS256", &rsa_jwk)];
        for (says, _) in keys {
            for (signs, of) in keys {
                let given = token(&json!({ "alg": says }).to_string(), "{}", |message| sign(signs, message));
                let presented = Presented::parse(&given).unwrap();
                assert_eq!(key(of).verifies(&presented), says == signs, "{says} by {signs}");
            }
        }
        // A key that says its algorithm verifies no other.
        let mut only = rsa_jwk.clone();
        only["alg"] = "PS256".into();
        let given = token(r#"{"alg":"RS256"}"#, "{}", |message| sign("RS256", message));
        assert!(!key(&only).verifies(&Presented::parse(&given).unwrap()));
        // A changed payload, and a signature that is cut.
        let given = token(r#"{"alg":"ES256"}"#, r#"{"a":1}"#, |message| sign("ES256", message));
        let (head, signature) = given.rsplit_once('.').unwrap();
        let changed = format!("{}.{}.{signature}", head.split('.').next().unwrap(), encode(r#"{"a":2}"#));
        assert!(!key(&ec_jwk).verifies(&Presented::parse(&changed).unwrap()));
        assert!(!key(&ec_jwk).verifies(&Presented::parse(&given[..given.len() - 2]).unwrap()));
    }

    #[test]
    fn what_is_no_token_or_asks_for_more_than_a_signature_is_refused_before_a_key_is_looked_for() {
        let long = format!("{}.e30.", "A".repeat(TOKEN_BYTES_MAX));
        let of = |header: &str, payload: &str| token(header, payload, |_| vec![1; 64]);
        let plain = r#"{"alg":"ES256"}"#;
        for (case, given, expected) in [
            ("empty", String::new(), "three parts"),
            ("two parts", "e30.e30".into(), "three parts"),
            ("five parts", "e30.e30.e30.e30.e30".into(), "three parts"),
            ("padding", "e30=.e30.e30".into(), "three parts"),
            ("standard base64", "e30.e30.+/+/".into(), "three parts"),
            ("too long", long, "at most 16384 bytes"),
            ("none", of(r#"{"alg":"none"}"#, "{}"), "`alg` is `none`"),
            ("none, without a signature", of(r#"{"alg":"none"}"#, "{}").split_inclusive('.').take(2).collect(), "alg"),
            ("a MAC", of(r#"{"alg":"HS256"}"#, "{}"), "`alg` is `HS256`"),
            ("another case", of(r#"{"alg":"es256"}"#, "{}"), "`alg` is `es256`"),
            ("no algorithm", of("{}", "{}"), "names no `alg`"),
            ("two algorithms", of(r#"{"alg":"ES256","alg":"none"}"#, "{}"), "`alg` stands there twice"),
            ("an extension", of(r#"{"alg":"ES256","crit":["exp"]}"#, "{}"), "demands extensions"),
            ("an unencoded payload", of(r#"{"alg":"ES256","b64":false}"#, "{}"), "demands extensions"),
            ("an access token", of(r#"{"alg":"ES256","typ":"at+jwt"}"#, "{}"), "another kind"),
            ("a logout token", of(r#"{"alg":"ES256","typ":"logout+jwt"}"#, "{}"), "another kind"),
            ("a number for a kid", of(r#"{"alg":"ES256","kid":7}"#, "{}"), "no short text"),
            ("no object", of(plain, "[]"), "no JSON object"),
            ("no JSON", of(plain, "{"), "payload cannot be read"),
            ("a claim twice", of(plain, r#"{"sub":"a","sub":"b"}"#), "`sub` stands there twice"),
            ("one deep inside", of(plain, r#"{"a":[{"b":1,"b":2}]}"#), "`b` stands there twice"),
            ("the same name, written otherwise", of(plain, "{\"a\":1,\"\\u0061\":2}"), "`a` stands there twice"),
        ] {
            let refused = Presented::parse(&given).unwrap_err().to_string();
            assert!(refused.contains(expected), "{case}: {refused}");
        }
        assert!(Presented::parse(&of(r#"{"alg":"ES256","typ":"JWT"}"#, "{}")).is_ok());
    }

    #[test]
    fn a_key_that_a_header_brings_verifies_nothing() {
        let ((theirs, _), (strange, strange_jwk)) = (ec(), ec());
        let random = SystemRandom::new();
        let header = json!({ "alg": "ES256", "jwk": strange_jwk, "jku": "https://evil.example/jwks", "x5c": ["AA"] });
        let given =
            token(&header.to_string(), "{}", |message| strange.sign(&random, message).unwrap().as_ref().to_vec());
        let presented = Presented::parse(&given).unwrap();
        let point = theirs.public_key().as_ref();
        let jwk = json!({ "kty": "EC", "crv": "P-256", "x": encode(&point[1..33]), "y": encode(&point[33..]) });
        assert!(!key(&jwk).verifies(&presented));
        assert!(key(&strange_jwk).verifies(&presented), "the signature itself is good");
    }

    #[test]
    fn of_a_key_set_only_keys_that_verify_signatures_are_taken() {
        let (_, ec) = ec();
        let with = |name: &str, value: Value| {
            let mut jwk = ec.clone();
            jwk[name] = value;
            jwk
        };
        let small = json!({ "kty": "RSA", "n": encode([255; 128]), "e": "AQAB" });
        let keys = json!([
            ec.clone(),
            with("use", "sig".into()),
            with("use", "enc".into()),
            with("key_ops", json!(["encrypt"])),
            with("alg", "HS256".into()),
            with("crv", "P-384".into()),
            with("x", "AA".into()),
            { "kty": "oct", "k": "AA", "kid": "ec" },
            small,
            "no key",
        ]);
        let set = json!({ "keys": keys }).to_string();
        assert_eq!(Key::of_set(set.as_bytes(), 100).unwrap().len(), 2);
        assert_eq!(Key::of_set(set.as_bytes(), 9).unwrap_err(), "it has more than 9 keys");
        assert!(Key::of_set(b"{}", 9).is_err() && Key::of_set(b"<html>", 9).is_err());
    }
}
