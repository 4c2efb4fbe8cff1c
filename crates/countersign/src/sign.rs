//! Signing a change with a passkey or a security key, so that a lying control plane cannot show one thing and have another signed:
//! the ledger is verified here, the difference rendered here, the challenge computed here, and the page that asks the
//! authenticator is served here. Of the control plane only the number that makes the ceremony good once is taken.
//!
//! | furniture | does |
//! |---|---|
//! | `ground` | folds the ledger, and keeps what was pinned of the mesh |
//! | `page` | serves the page |

use std::{process::Stdio, time::Duration};

use serde::de::DeserializeOwned;
use serde_json::json;

use countersign_api::local::{
    AnsweredProposal, Applied, Apply, ApplyAs, Ceremony, GateOutcome, Mesh, Proposal, ProposalDetail, Shown,
};
use countersign_core::{
    assurance::{
        challenge::{Challenge, Purpose},
        webauthn::LOCAL_ORIGIN,
    },
    canonical::Digest,
    change::{Bodies, Change, ChangeSet},
    countersignature::{self, Countersignature, Signed},
    gate::Author,
    identity::{FactorId, OperatorName},
    keyring::Pins,
};

use crate::{
    client::Client,
    difference::difference,
    error::Failure,
    operator::Who,
    render::{self, Output, Paint},
};

mod ground;
mod page;

pub use ground::{Ground, Pinned};
use page::{Answer, Page};

/// How long the page waits for the authenticator: as long as the number of its ceremony is good.
const SIGN_WITHIN: Duration = Duration::from_secs(5 * 60);
/// The host of the page's origin: what keys have to be enrolled for.
const RELYING_PARTY: &str = "localhost";

/// What is to be signed, all of it computed from what was verified here.
struct Signing<'a> {
    ground: &'a Ground,
    /// The pending change.
    id: &'a str,
    change_set: &'a ChangeSet,
    bodies: &'a Bodies,
    author: &'a Author,
    operator: &'a OperatorName,
}

/// Whether a change is signed here: when the operator says so, and in a sealed mesh wherever a person reads the answer.
pub async fn is_wanted(control: &Client, who: &Who, output: Output) -> Result<bool, Failure> {
    if who.sign || who.otp.is_some() || output == Output::Json {
        return Ok(who.sign);
    }
    let mesh: Mesh = control.get("/v1/mesh").await?;
    let Some(name) = &mesh.state.trust_domain else { return Ok(false) };
    Ok(mesh.state.seal.is_some()
        || Pinned::here().and_then(|pinned| pinned.of(name)).is_ok_and(|pins| pins.seal.is_some()))
}

/// The mesh, verified here from its first entry; what is seen of it for the first time is pinned, and said.
pub async fn verified(control: &Client, who: &Who) -> Result<Ground, Failure> {
    let pinned = Pinned::here()?;
    let ground = Ground::verify(control, &pinned, who.anchor).await?;
    let (Some(name), seen) = (&ground.mesh.state.trust_domain, ground.keyring.pins()) else { return Ok(ground) };
    if pinned.pin(name, seen)? {
        let digest = |pin: Option<Digest>| pin.map_or_else(|| "not yet".to_owned(), |pin| pin.to_string());
        render::print_error(&format!(
            "{} {name} is pinned from now on; compare with the other operators\n  anchor {}\n  sealed {}\n",
            Paint::stderr().note("seen for the first time:"),
            digest(seen.anchor),
            digest(seen.seal),
        ));
    }
    Ok(ground)
}

/// Asks for `apply`, planned on `ground`, and signs it.
pub async fn ask(control: &Client, ground: &Ground, who: &Who, apply: Apply) -> Result<Applied, Failure> {
    let author = signer(ground, who, None)?;
    let shown = Shown { operator: Some(author.clone()), ..Shown::default() };
    let (change_set, bodies) = (apply.change_set.clone(), apply.bodies.clone());
    let refused = match control.post::<Applied>("/v1/changes", &ApplyAs { apply, shown }).await {
        Ok(applied) => return Ok(applied),
        Err(refused) => refused,
    };
    let id = match refused.refusal() {
        Some(refusal) if refusal.outcome == GateOutcome::StepUp => refusal.change.clone(),
        _ => None,
    };
    let Some(id) = id else { return Err(refused) };
    let (change_set, bodies) = (&change_set, &bodies);
    let asking = Author::Operator(author.clone());
    let signing = Signing { ground, id: &id, change_set, bodies, author: &asking, operator: &author };
    signed(control, &signing, "apply", open_browser).await
}

/// Signs the pending change `id` of the operator themselves, and applies exactly that.
pub async fn apply_pending(control: &Client, who: &Who, id: &str) -> Result<Applied, Failure> {
    let (ground, detail) = pending(control, who, id).await?;
    let ProposalDetail { proposal: Proposal { author, .. }, change_set, bodies } = &detail;
    let operator = author.operator().ok_or_else(|| {
        Failure::refused(format!("`{author}` asked for it, and signs nothing"))
            .help(format!("an operator runs `countersign change countersign {id} --sign`"))
    })?;
    let signing = Signing { ground: &ground, id, change_set, bodies, author, operator };
    signed(control, &signing, "apply", open_browser).await
}

/// Countersigns the pending change `id` of somebody else.
pub async fn countersign(control: &Client, who: &Who, id: &str) -> Result<AnsweredProposal, Failure> {
    let (ground, detail) = pending(control, who, id).await?;
    let ProposalDetail { proposal: Proposal { author, .. }, change_set, bodies } = &detail;
    let operator = &signer(&ground, who, Some(author))?;
    let signing = Signing { ground: &ground, id, change_set, bodies, author, operator };
    signed(control, &signing, "countersign", open_browser).await
}

async fn pending(control: &Client, who: &Who, id: &str) -> Result<(Ground, ProposalDetail), Failure> {
    let ground = verified(control, who).await?;
    let detail: ProposalDetail = control.get(&format!("/v1/proposals/{id}")).await?;
    Ok((ground, detail))
}

/// Who signs: the operator that is named, or the only one who can beside the author.
fn signer(ground: &Ground, who: &Who, author: Option<&Author>) -> Result<OperatorName, Failure> {
    let mut others = ground.keyring.signers().filter(|name| author.is_none_or(|author| author != *name));
    match (&who.operator, others.next(), others.next()) {
        (Some(named), ..) => Ok(named.clone()),
        (None, Some(only), None) => Ok(only.clone()),
        (None, None, _) => Err(Failure::new("no operator can sign it").help("enrol a passkey or a security key first")),
        (None, Some(_), Some(_)) => {
            Err(Failure::usage("several operators can sign, and none is named").help("name one: `--operator NAME`"))
        }
    }
}

/// INVARIANT (signed-as-shown): what is shown, hashed and signed is one change-set, on a history that was verified here; the control
/// plane has a say in neither.
async fn signed<T: DeserializeOwned>(
    control: &Client,
    signing: &Signing<'_>,
    verb: &str,
    open: impl FnOnce(&str),
) -> Result<T, Failure> {
    let Signing { ground, id, change_set, author, operator, .. } = *signing;
    let asked_by = author.to_string();
    let text = shown(signing)?;
    let keyring = &ground.keyring;
    keyring.still_holds(change_set).map_err(|(revision, _)| {
        Failure::refused(format!("revision {revision} has made something else of the change"))
            .help("plan and apply again")
    })?;
    let (Some(anchor), Some(root)) = (keyring.anchor(), keyring.root_at(change_set.base)) else {
        return Err(Failure::refused("the mesh is unprotected, or the change was planned on an old revision"));
    };
    let keys = keys(ground, operator)?;
    let named = Shown { operator: Some(operator.clone()), ..Shown::default() };
    let ceremony: Ceremony = control.post(&format!("/v1/proposals/{id}/ceremony"), &named).await?;
    let purpose = if operator == author { Purpose::StepUp } else { Purpose::Countersign };
    let (digest, base, nonce) = (change_set.digest(), change_set.base, ceremony.nonce);
    let challenge = Challenge { anchor, purpose, base, root, change_set: digest, nonce };
    let allowed: Vec<_> = keys.iter().map(|id| json!({ "type": "public-key", "id": id })).collect();
    let page = Page::open(&page::Shown {
        mesh: ground.mesh.state.trust_domain.as_ref().map(ToString::to_string).unwrap_or_default(),
        operator: operator.to_string(),
        purpose: if operator == author { "apply it" } else { "countersign it" },
        author: asked_by.clone(),
        base: base.0,
        digest: digest.to_string(),
        text: text.clone(),
        options: json!({
            "challenge": challenge.encode(),
            "rpId": RELYING_PARTY,
            "timeout": SIGN_WITHIN.as_millis() as u64,
            "userVerification": "required",
            "allowCredentials": allowed,
        }),
    })
    .await?;
    let url = page.url();
    render::print_error(&format!(
        "{text}\n{} {digest}\n{} {url}\n",
        Paint::stderr().dim("digest"),
        Paint::stderr().note("sign it in a browser on this machine:"),
    ));
    open(&url);
    let accept = |answer: Answer| {
        let countersignature = Countersignature {
            operator: operator.clone(),
            credential: answer.credential,
            purpose,
            base,
            root,
            nonce,
            authenticator_data: answer.authenticator_data,
            client_data_json: answer.client_data_json,
            signature: answer.signature,
        };
        let signed = Signed { anchor, author: &asked_by, change_set: digest, base, root };
        match countersignature::verify(&countersignature, keyring, &signed) {
            Ok(_) => Ok(countersignature),
            Err(why) => Err(why.to_string()),
        }
    };
    let Ok(countersignature) = tokio::time::timeout(SIGN_WITHIN, page.signed(accept)).await else {
        return Err(Failure::refused(format!("nobody signed within {SIGN_WITHIN:?}, and nothing was changed"))
            .help(format!("begin again with `countersign apply --change {id} --sign`")));
    };
    let shown = Shown { countersignature: Some(Box::new(countersignature)), ..named };
    control.post(&format!("/v1/proposals/{id}/{verb}"), &shown).await
}

/// The difference as it will be signed; every text that it refers to has to be here.
fn shown(signing: &Signing<'_>) -> Result<String, Failure> {
    let Signing { ground, change_set, bodies, .. } = signing;
    let mut all = ground.mesh.bodies.clone();
    all.extend(bodies);
    let missing = change_set.changes.iter().filter_map(Change::body).find(|digest| all.get(digest).is_none());
    if missing.is_some() || !bodies.forged().is_empty() {
        return Err(Failure::refused("a text of the change is missing or is another, and nothing was signed"));
    }
    if let Err(error) = ground.mesh.state.apply_all(change_set) {
        return Err(Failure::refused("the change does not follow from the mesh that was verified").because(&error));
    }
    Ok(legible(&difference(&change_set.changes, &all, Some(&ground.mesh), Paint::plain())))
}

/// Without what would have a terminal or a browser show lines in another order than they stand in, or not at all.
fn legible(text: &str) -> String {
    let hides = |c: char| {
        (c.is_control() && !matches!(c, '\n' | '\t'))
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
    };
    text.chars().map(|c| if hides(c) { '\u{fffd}' } else { c }).collect()
}

/// The keys of `operator` that sign on the page.
fn keys(ground: &Ground, operator: &OperatorName) -> Result<Vec<FactorId>, Failure> {
    let factors = ground.mesh.state.operators.get(operator).into_iter().flat_map(|operator| &operator.factors);
    let here = factors.filter(|(_, factor)| {
        factor.signing_key().is_some_and(|key| {
            let relying_party = &key.relying_party;
            relying_party.id == RELYING_PARTY && relying_party.origins.iter().any(|origin| origin == LOCAL_ORIGIN)
        })
    });
    let keys: Vec<_> = here.map(|(id, _)| id.clone()).collect();
    if keys.is_empty() {
        return Err(Failure::refused(format!(
            "operator `{operator}` has no passkey or security key that signs on this machine"
        ))
        .help("enrol one on a dashboard under `http://localhost`; keys of another address sign there only"));
    }
    Ok(keys)
}

/// Opens the page where there is a desktop; where there is none, the address was printed.
pub fn open_browser(url: &str) {
    if ["DISPLAY", "WAYLAND_DISPLAY"].iter().any(|name| std::env::var_os(name).is_some()) {
        let opened = std::process::Command::new("xdg-open")
            .arg(url)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        drop(opened);
    }
}

/// Whether a join token pins what this user pinned of the mesh. Of a mesh that nothing is pinned of, there is nothing to say.
pub fn pins_the_same(token: &str, pinned: Pins) -> bool {
    let part = |digest: Digest| String::from(countersignature::Bytes(digest.0.to_vec()));
    let mut parts = token.split('.').skip(3);
    [pinned.anchor, pinned.seal]
        .into_iter()
        .all(|pin| pin.is_none_or(|pin| parts.next().is_some_and(|found| found == part(pin))))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::TcpStream,
        sync::{Arc, Mutex},
        thread::JoinHandle,
    };

    use countersign_api::run_file::CONTROL_SOCKET;
    use countersign_core::{
        assurance::webauthn::RelyingParty,
        identity::ServiceName,
        keyring::Keyring,
        ledger::{Batch, Follower},
        service::{Protocol, ServiceSpec},
    };
    use countersign_testkit::security_key::SecurityKey;
    use http_body_util::{BodyExt, Full};
    use hyper::{body::Bytes, service::service_fn};
    use hyper_util::rt::TokioIo;
    use serde_json::Value;

    use super::*;
    use crate::mesh_finder::Place;

    fn alice() -> OperatorName {
        OperatorName::parse("alice").unwrap()
    }

    fn declare(given: &str) -> Change {
        Change::DeclareService { name: ServiceName::parse(given).unwrap(), spec: ServiceSpec::new(Protocol::Http) }
    }

    fn relying_party() -> RelyingParty {
        RelyingParty { id: RELYING_PARTY.into(), origins: vec!["http://localhost:1".into(), LOCAL_ORIGIN.into()] }
    }

    /// A ledger as a control plane keeps it, which may not be what the operators stand behind.
    #[derive(Clone, Default)]
    struct Ledger {
        follower: Follower,
        keyring: Keyring,
        lines: Vec<(String, String)>,
    }

    impl Ledger {
        /// A mesh that alice anchored with `key` and sealed.
        fn sealed(key: &SecurityKey) -> Self {
            let mut ledger = Self::default();
            ledger.append(vec![Change::CreateMesh { trust_domain: "shop.example".parse().unwrap() }]);
            let (id, factor) = (key.factor_id(), key.enrolled(&relying_party()));
            ledger.append(vec![
                Change::InviteOperator { name: alice(), roles: ["owner".into()].into() },
                Change::EnrollOperator { name: alice(), id, factor },
            ]);
            ledger.append(vec![Change::SealSettings { quorum: 1 }]);
            ledger
        }

        fn append(&mut self, changes: Vec<Change>) {
            let set = ChangeSet { base: self.follower.revision(), changes };
            let draft = self.follower.draft(1, "alice", &set, &Bodies::default()).unwrap();
            let _ = self.keyring.take(&draft.bytes, &draft.change_set);
            let text = |bytes| String::from_utf8(bytes).unwrap();
            self.lines.push((text(draft.bytes), text(draft.change_set)));
            self.follower = draft.next;
        }
    }

    /// A control plane that says what it is told to say, and writes down what it hears.
    struct Control {
        client: Client,
        heard: Arc<Mutex<Vec<(String, Value)>>>,
        dir: tempfile::TempDir,
    }

    impl Control {
        fn serve(ledger: &Ledger) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let listener = tokio::net::UnixListener::bind(dir.path().join(CONTROL_SOCKET)).unwrap();
            let heard = Arc::new(Mutex::new(Vec::new()));
            let (told, ledger) = (heard.clone(), ledger.clone());
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let (told, ledger) = (told.clone(), ledger.clone());
                    let serve = service_fn(move |request: http::Request<hyper::body::Incoming>| {
                        let (told, ledger) = (told.clone(), ledger.clone());
                        async move {
                            let path = request.uri().path().to_owned();
                            let body = request.into_body().collect().await?.to_bytes();
                            let body: Value = serde_json::from_slice(&body).unwrap_or_default();
                            told.lock().unwrap().push((path.clone(), body.clone()));
                            let (status, answer) = Self::answer(&path, &body, &ledger);
                            let response =
                                http::Response::builder().status(status).body(Full::new(Bytes::from(answer)));
                            Ok::<_, hyper::Error>(response.unwrap())
                        }
                    });
                    tokio::spawn(
                        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), serve),
                    );
                }
            });
            let place = Place { dir: None, data_dir: dir.path().into(), dashboard: None };
            Self { client: Client::control(&place), heard, dir }
        }

        fn answer(path: &str, body: &Value, ledger: &Ledger) -> (u16, String) {
            let digest = || {
                let set: ChangeSet = serde_json::from_value(body["change_set"].clone()).unwrap();
                set.digest()
            };
            match path {
                "/v1/ledger" => {
                    let line = |(entry, change_set): &(String, String)| {
                        json!({ "entry": entry, "change_set": change_set }).to_string() + "\n"
                    };
                    (200, ledger.lines.iter().map(line).collect())
                }
                "/v1/ledger/bodies" => (200, String::new()),
                "/v1/changes" => {
                    let refusal = json!({ "outcome": "step_up", "change": "p1", "digest": digest(), "requires": null, "url": null });
                    (
                        403,
                        json!({ "title": "the change needs a passkey", "status": 403, "refusal": refusal }).to_string(),
                    )
                }
                "/v1/proposals/p1/ceremony" => {
                    let nonce = Digest::of(b"nonce");
                    (
                        200,
                        json!({ "operator": "alice", "purpose": "step_up", "nonce": nonce, "expires_at_ms": 1 })
                            .to_string(),
                    )
                }
                "/v1/proposals/p1/apply" => {
                    (200, json!({ "revision": 4, "digest": Digest::of(b""), "protected": true }).to_string())
                }
                other => panic!("nobody asks for {other}"),
            }
        }

        fn pinned(&self) -> Pinned {
            Pinned::below(self.dir.path())
        }
    }

    /// What a browser gets: status, head, body.
    fn browse(request: String) -> (u16, String, String) {
        let mut stream = TcpStream::connect(LOCAL_ORIGIN.trim_start_matches("http://")).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), head.to_owned(), body.to_owned())
    }

    fn get(path: &str, host: &str) -> (u16, String, String) {
        browse(format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n"))
    }

    fn post(path: &str, origin: &str, body: &Value) -> (u16, String, String) {
        let (body, host) = (body.to_string(), LOCAL_ORIGIN.trim_start_matches("http://"));
        let length = body.len();
        browse(format!(
            "POST {path} HTTP/1.1\r\nhost: {host}\r\norigin: {origin}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
        ))
    }

    fn answer_of(key: &mut SecurityKey, options: &Value) -> Value {
        let answer = key.answer(options, LOCAL_ORIGIN, None);
        json!({
            "credential": answer["id"],
            "authenticator_data": answer["response"]["authenticatorData"],
            "client_data_json": answer["response"]["clientDataJSON"],
            "signature": answer["response"]["signature"],
        })
    }

    /// PROVES (signed-as-shown)
    #[tokio::test(flavor = "multi_thread")]
    async fn what_the_page_shows_is_what_the_command_shows_and_what_is_signed() {
        let mut key = SecurityKey::new();
        let ledger = Ledger::sealed(&key);
        let control = Control::serve(&ledger);
        let ground = Ground::verify(&control.client, &control.pinned(), None).await.unwrap();
        let change_set = ChangeSet { base: ground.mesh.revision, changes: vec![declare("web")] };
        let (bodies, operator) = (Bodies::default(), alice());
        let author = Author::Operator(operator.clone());
        let signing = Signing {
            ground: &ground,
            id: "p1",
            change_set: &change_set,
            bodies: &bodies,
            author: &author,
            operator: &operator,
        };
        let expected =
            [shown(&signing).unwrap().replace('"', "&quot;").replace('\'', "&#39;"), change_set.digest().to_string()];
        let browser: Arc<Mutex<Option<JoinHandle<SecurityKey>>>> = Arc::default();
        let (opened, ours) = (browser.clone(), LOCAL_ORIGIN.trim_start_matches("http://").to_owned());
        let open = move |url: &str| {
            let path = url.strip_prefix(LOCAL_ORIGIN).unwrap().to_owned();
            *opened.lock().unwrap() = Some(std::thread::spawn(move || {
                let (status, head, html) = get(&path, &ours);
                assert_eq!(status, 200);
                assert!(head.contains("content-security-policy: default-src 'none'"), "{head}");
                assert!(expected.iter().all(|text| html.contains(text)), "{html}");
                assert!(!html.contains("onclick") && !html.contains("<style"), "{html}");
                assert_eq!(get(&path, "evil.example:7449").0, 421, "another name for this machine");
                assert_eq!(get("/", &ours).0, 404, "who does not know the address");
                let options: Value = serde_json::from_str(&get(&format!("{path}options.json"), &ours).2).unwrap();
                let to = format!("{path}answer");
                let good = answer_of(&mut key, &options);
                assert_eq!(post(&to, "http://localhost:1", &good).0, 403, "another page");
                let (status, _, why) = post(&to, LOCAL_ORIGIN, &answer_of(&mut SecurityKey::new(), &options));
                assert_eq!(status, 422, "{why}");
                assert!(why.contains("has no such factor"), "{why}");
                let mut other = options.clone();
                other["challenge"] = "b3RoZXI".into();
                assert!(post(&to, LOCAL_ORIGIN, &answer_of(&mut key, &other)).2.contains("answers another challenge"));
                let (status, _, said) = post(&to, LOCAL_ORIGIN, &good);
                assert_eq!(status, 200, "{said}");
                key
            }));
        };
        let applied: Applied = signed(&control.client, &signing, "apply", open).await.unwrap();
        assert_eq!(applied.revision.0, 4);
        let browser = browser.lock().unwrap().take().unwrap();
        tokio::task::spawn_blocking(move || browser.join().unwrap()).await.unwrap();
        assert!(TcpStream::connect(LOCAL_ORIGIN.trim_start_matches("http://")).is_err(), "the page is gone");

        let (path, body) = control.heard.lock().unwrap().last().cloned().unwrap();
        assert_eq!(path, "/v1/proposals/p1/apply");
        let given: Shown = serde_json::from_value(body).unwrap();
        let countersignatures = vec![*given.countersignature.unwrap()];
        let holds = ledger.keyring.still_holds(&change_set).unwrap();
        let draft =
            ledger.follower.draft_countersigned(1, "alice", &change_set, &bodies, countersignatures, holds).unwrap();
        let judged = ledger.keyring.clone().take(&draft.bytes, &draft.change_set).unwrap();
        assert_eq!(judged.signers, [alice()].into(), "every agent takes it");
        let (entries, change_sets) = ([&draft.bytes], [&draft.change_set]);
        let (first_index, size, root) = (3, 4, draft.next.root());
        let batch = Batch { first_index, entries: &entries, change_sets: &change_sets, bodies: &bodies, size, root };
        ledger.follower.clone().extend(&batch).unwrap();
    }

    #[tokio::test]
    async fn nothing_is_signed_on_a_ledger_that_does_not_hold() {
        let key = SecurityKey::new();
        let good = Ledger::sealed(&key);
        let pins = good.keyring.pins();
        let name = "shop.example".parse().unwrap();
        let forged = {
            let mut ledger = good.clone();
            ledger.append(vec![declare("evil")]);
            ledger
        };
        let mut edited = good.clone();
        edited.lines[0].1 = edited.lines[0].1.replace("shop", "shot");
        let mut cut = good.clone();
        cut.lines.pop();
        for (case, ledger, expected) in [
            ("an entry that nobody signed", forged, "was signed by 0 of 1 operators"),
            ("an edited change-set", edited, "entry 0 of the ledger is damaged"),
            ("cut before the seal", cut, "ends before the entry that protected or sealed the mesh"),
            ("another mesh", Ledger::sealed(&SecurityKey::new()), "it is another mesh"),
        ] {
            let control = Control::serve(&ledger);
            let pinned = control.pinned();
            assert!(pinned.pin(&name, pins).unwrap() && !pinned.pin(&name, pins).unwrap());
            let failure = Ground::verify(&control.client, &pinned, None).await.err().unwrap();
            let said = failure.render(Output::Text, Paint::plain());
            assert!(said.contains(expected), "{case}: {said}");
        }
        let control = Control::serve(&good);
        let told = Ground::verify(&control.client, &control.pinned(), Some(Digest::of(b"other"))).await;
        assert!(told.is_err(), "the operator was told another anchor");
        let told = Ground::verify(&control.client, &control.pinned(), pins.anchor).await.unwrap();
        assert_eq!(told.keyring.pins(), pins);
    }

    #[test]
    fn a_join_token_is_shown_only_if_it_pins_what_is_pinned_here() {
        let part = |digest: Digest| String::from(countersignature::Bytes(digest.0.to_vec()));
        let (anchor, seal, other) = (Digest::of(b"a"), Digest::of(b"s"), Digest::of(b"o"));
        let token = |pins: &[Digest]| {
            let parts: Vec<String> = ["csj1", "secret", "root"]
                .map(str::to_owned)
                .into_iter()
                .chain(pins.iter().copied().map(part))
                .collect();
            parts.join(".")
        };
        let sealed = Pins { anchor: Some(anchor), seal: Some(seal), recovery: None };
        for (case, token, pinned, good) in [
            ("nothing is pinned", token(&[]), Pins::default(), true),
            ("both", token(&[anchor, seal]), sealed, true),
            ("sealed since", token(&[anchor, seal]), Pins { seal: None, ..sealed }, true),
            ("another anchor", token(&[other, seal]), sealed, false),
            ("another seal", token(&[anchor, other]), sealed, false),
            ("no seal", token(&[anchor]), sealed, false),
            ("none of them", token(&[]), sealed, false),
        ] {
            assert_eq!(pins_the_same(&token, pinned), good, "{case}");
        }
    }

    #[test]
    fn what_hides_is_made_visible() {
        let text = "permit\u{202e} \u{1b}[8m(x);\u{200b}\n\tok";
        assert_eq!(legible(text), "permit\u{fffd} \u{fffd}[8m(x);\u{fffd}\n\tok");
    }
}
