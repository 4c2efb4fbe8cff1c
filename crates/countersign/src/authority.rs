//! `authority show`: the roots that verify every identity of the mesh, what signs them now, and the key of its ledger.
//! `authority rotate` and its steps: another root. `authority reseal`: another key that seals them.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Subcommand;

use countersign_api::local::{
    AcceptAbove, AcceptedAbove, AskAbove, AskedAbove, AuthorityState, AuthorityStep, AuthorityView, CertificateView,
    KeyPlace, KeyReplaced, ReplaceKeyAs, Reseal, RootView, SealedAnew, SigningKeys, StepAs, Stepped,
};

use crate::{
    client::Client,
    error::{Done, Failure},
    mesh_finder::Place,
    operator::{Asker, Who},
    render::{self, Output, Paint, cell},
    sealing_key::NextSealingKeyArguments,
    signal,
};

/// How long it is waited for every proxy to enforce that tokens were revoked with the key that signed them.
const ENFORCED_WITHIN: Duration = Duration::from_secs(10);

/// What can be asked about the authority.
#[derive(Debug, Subcommand)]
pub enum AuthorityVerb {
    /// Show the roots that verify the mesh's identities, and what signs them now
    Show,
    /// Let another root sign, one step at a time: prepares it, or activates what is prepared
    ///
    /// Each step says what comes next. Nothing is cut by it: what was signed before is good until it expires.
    ///
    /// With `--tokens` or `--jwt-svids`: lets the next key sign these, which everybody knows already.
    Rotate {
        /// Another key for access tokens, in place of another root
        #[arg(long, conflicts_with = "jwt_svids")]
        tokens: bool,
        /// Another key for JWT-SVIDs, in place of another root
        #[arg(long)]
        jwt_svids: bool,
        /// Somebody else may have the key that signs now: nothing that it signed is believed any more
        #[arg(long)]
        compromised: bool,
        /// Who asks.
        #[command(flatten)]
        asker: Asker,
    },
    /// Make another root: everybody learns to verify by it, and it signs nothing
    Prepare {
        /// Who asks.
        #[command(flatten)]
        asker: Asker,
    },
    /// Let the prepared root sign from now on
    ///
    /// Refused while a connected host does not hold it yet.
    Activate {
        /// Its number, as `authority show` says it
        root: u32,
        /// Who asks.
        #[command(flatten)]
        asker: Asker,
    },
    /// Let nothing new rest on an old root: whoever has an identity of it gets another at once
    Taint {
        /// Its number, as `authority show` says it
        root: u32,
        /// Who asks.
        #[command(flatten)]
        asker: Asker,
    },
    /// Take a root out: nobody verifies by it any more, and what still rests on it is cut
    ///
    /// Refused while identities rest on it that have not expired. A prepared root can be taken back at any time.
    Revoke {
        /// Its number, as `authority show` says it
        root: u32,
        /// Cut what still rests on it
        #[arg(long)]
        force: bool,
        /// Who asks.
        #[command(flatten)]
        asker: Asker,
    },
    /// Ask an authority above to sign a key of this mesh: prints the request (PKCS #10, PEM)
    ///
    /// The key is made here and stays sealed. Have the request signed as CA:TRUE with pathlen:1 by a root whose key is offline, or by
    /// your own certificate authority, and hand the answer in with `authority accept`. Shown again until it is answered.
    Request {
        /// Make another key, and forget the one that waits for an answer
        #[arg(long)]
        fresh: bool,
        /// Who asks.
        #[command(flatten)]
        asker: Asker,
    },
    /// Take up what an authority above signed: prepares its root, or replaces what it signed before
    ///
    /// Refused while anything about it would not be verified by everybody; nothing is cut by it.
    Accept {
        /// The certificates, PEM: the signed one first, then each that signed the one before; the root is the last
        #[arg(long, value_name = "FILE")]
        chain: PathBuf,
        /// Who asks.
        #[command(flatten)]
        asker: Asker,
    },
    /// Seal every key with another key-encryption key from now on; the old one opens nothing any more
    ///
    /// It is a change: the gate judges it, and the ledger names the new key by a fingerprint. Where a factor or somebody's
    /// countersignature is asked for first, run it again with the same key when the change is in the ledger.
    Reseal {
        /// Where the next key comes from; the control plane reads it.
        #[command(flatten)]
        next: NextSealingKeyArguments,
        /// Who asks.
        #[command(flatten)]
        who: Who,
    },
}

/// Does what is asked for.
pub async fn authority(place: &Place, verb: AuthorityVerb, output: Output) -> Done {
    match verb {
        AuthorityVerb::Show => show(place, output).await,
        AuthorityVerb::Rotate { tokens, jwt_svids, compromised, asker } => {
            let keys = tokens.then_some(SigningKeys::Tokens).or(jwt_svids.then_some(SigningKeys::JwtSvids));
            match keys {
                Some(keys) => replace(place, keys, compromised, &asker, output).await,
                None if compromised => Err(Failure::new("`--compromised` goes with `--tokens` or `--jwt-svids`").help(
                    "of a root: `authority rotate`, twice, then `authority taint` and `authority revoke --force`",
                )),
                None => step(place, AuthorityStep::Next, false, &asker, output).await,
            }
        }
        AuthorityVerb::Prepare { asker } => step(place, AuthorityStep::Prepare, false, &asker, output).await,
        AuthorityVerb::Activate { root, asker } => {
            step(place, AuthorityStep::Activate(root), false, &asker, output).await
        }
        AuthorityVerb::Taint { root, asker } => step(place, AuthorityStep::Taint(root), false, &asker, output).await,
        AuthorityVerb::Revoke { root, force, asker } => {
            step(place, AuthorityStep::Revoke(root), force, &asker, output).await
        }
        AuthorityVerb::Request { fresh, asker } => request(place, fresh, &asker, output).await,
        AuthorityVerb::Accept { chain, asker } => accept(place, &chain, &asker, output).await,
        AuthorityVerb::Reseal { next, who } => reseal(place, next.place()?, &who, output).await,
    }
}

async fn show(place: &Place, output: Output) -> Done {
    let authority: AuthorityView = Client::control(place).get("/v1/authority").await?;
    render::answer(output, &authority, |authority, paint| {
        format!(
            "{} {}\n{} {}s\n{} {}\n{} {}\n{} {}\n{}\n{}\n{}",
            paint.dim("trust domain   "),
            paint.strong(authority.trust_domain.as_str()),
            paint.dim("SVID lifetime  "),
            authority.svid_lifetime_seconds,
            paint.dim("keys sealed by "),
            authority.sealed_by,
            paint.dim("bundle         "),
            authority.bundle_sequence,
            paint.dim("log key        "),
            authority.log_key,
            authority.requested_at_ms.map_or_else(String::new, |requested_at_ms| {
                let since = render::distance(requested_at_ms, render::now_ms());
                format!("{} {since}, and not answered: `countersign authority accept`\n", paint.dim("asked above    "))
            }),
            table(&authority.roots, paint),
            authority.bundle_pem,
        )
    })
}

fn table(roots: &[RootView], paint: Paint) -> String {
    let now_ms = render::now_ms();
    let row = |number: String, state: String, certificate: &CertificateView| {
        vec![
            cell(number),
            cell(state),
            cell(&certificate.subject),
            cell(render::distance(certificate.not_after_ms, now_ms)),
            cell(certificate.sha256),
        ]
    };
    let rows = roots.iter().flat_map(|one| {
        let state = format!("{} {}", one.state, render::distance(one.since_ms, now_ms));
        let below = one.above.iter().rev().chain([&one.issuing]).map(|one| row(String::new(), String::new(), one));
        std::iter::once(row(one.number.to_string(), state, &one.root)).chain(below).collect::<Vec<_>>()
    });
    render::table(&["ROOT", "STATE", "SUBJECT", "EXPIRES", "SHA-256"], rows, paint)
}

async fn step(place: &Place, step: AuthorityStep, force: bool, asker: &Asker, output: Output) -> Done {
    let asked = StepAs { step, force, shown: asker.shown() };
    let stepped: Stepped = Client::control(place).post("/v1/authority/steps", &asked).await?;
    render::answer(output, &stepped, |stepped, paint| {
        let Stepped { step, number, cut, roots } = stepped;
        let old = roots.iter().find(|one| matches!(one.state, AuthorityState::Old | AuthorityState::Tainted));
        let (done, next) = match step {
            AuthorityStep::Next | AuthorityStep::Prepare => (
                "prepared:",
                match old {
                    Some(old) => format!("taint and revoke root {} first, then `countersign authority activate {number}`", old.number),
                    None => format!("once every host holds it, in a moment: `countersign authority activate {number}`"),
                },
            ),
            AuthorityStep::Activate(_) => (
                "active:",
                old.map_or_else(String::new, |old| {
                    format!("`countersign authority taint {}`, at once where its key is not safe; else it goes by itself in a day", old.number)
                }),
            ),
            AuthorityStep::Taint(_) => (
                "tainted:",
                format!("`countersign authority revoke {number}`, once what rests on it has expired; else it goes by itself"),
            ),
            AuthorityStep::Revoke(_) => ("revoked:", String::new()),
        };
        let mut text = format!("{} root {number}\n", paint.good(done));
        if *cut > 0 {
            text.push_str(&format!("{} {cut} identities that rested on it\n", paint.warn("cut:")));
        }
        if !next.is_empty() {
            text.push_str(&format!("{} {next}\n", paint.note("next:")));
        }
        format!("{text}\n{}", table(roots, paint))
    })
}

async fn replace(place: &Place, keys: SigningKeys, compromised: bool, asker: &Asker, output: Output) -> Done {
    let control = Client::control(place);
    let asked = ReplaceKeyAs { keys, compromised, shown: asker.shown() };
    let replaced: KeyReplaced = control.post("/v1/authority/keys", &asked).await?;
    let kind = match keys {
        SigningKeys::Tokens => "access tokens",
        SigningKeys::JwtSvids => "JWT-SVIDs",
    };
    render::answer(output, &replaced, |replaced, paint| {
        let before = match replaced.compromised {
            true => "is believed by nobody any more",
            false => "still verifies what it signed, for an hour",
        };
        format!(
            "{} {kind} with key {}\n{} key {} {before}\n",
            paint.good("signs:"),
            replaced.key_id,
            paint.note("before:"),
            replaced.replaced
        )
    })?;
    match replaced.signal {
        Some(signal) => signal::say(&signal::wait(&control, signal, ENFORCED_WITHIN).await?, output),
        None => Ok(()),
    }
}

async fn request(place: &Place, fresh: bool, asker: &Asker, output: Output) -> Done {
    let asked = AskAbove { fresh, shown: asker.shown() };
    let asked: AskedAbove = Client::control(place).post("/v1/authority/request", &asked).await?;
    if !asked.is_new {
        eprintln!("note: this one was made before and waits for its answer; `--fresh` makes another key");
    }
    render::answer(output, &asked, |asked, _| asked.csr_pem.clone())
}

async fn accept(place: &Place, chain: &Path, asker: &Asker, output: Output) -> Done {
    let unreadable =
        |error: std::io::Error| Failure::new(format!("could not read `{}`", chain.display())).because(&error);
    let chain_pem = std::fs::read_to_string(chain).map_err(unreadable)?;
    if chain_pem.contains("PRIVATE KEY-----") {
        let title = format!("`{}` holds a private key, and none of it was sent", chain.display());
        return Err(
            Failure::new(title).help("give the certificates alone; the key of an authority above stays with it")
        );
    }
    let asked = AcceptAbove { chain_pem, shown: asker.shown() };
    let accepted: AcceptedAbove = Client::control(place).post("/v1/authority/accept", &asked).await?;
    render::answer(output, &accepted, |accepted, paint| {
        let AcceptedAbove { number, renewed, roots } = accepted;
        let (done, next) = match renewed {
            true => (format!("{} what signs below root {number}", paint.good("replaced:")), String::new()),
            false => (
                format!("{} root {number}", paint.good("prepared:")),
                format!(
                    "{} once every host holds it, in a moment: `countersign authority activate {number}`\n",
                    paint.note("next:")
                ),
            ),
        };
        format!("{done}\n{next}\n{}", table(roots, paint))
    })
}

async fn reseal(place: &Place, next: KeyPlace, who: &Who, output: Output) -> Done {
    let asked = Reseal { next, shown: who.shown() };
    let sealed: SealedAnew = Client::control(place).post("/v1/authority/reseal", &asked).await?;
    render::answer(output, &sealed, |sealed, paint| {
        let by = sealed.revision.map_or_else(String::new, |revision| format!(", chosen by revision {revision}"));
        format!(
            "{} {} secrets with key {}{by}\n{} {}\n{} the old key opens nothing that is kept now; copies made before it still open with it\n",
            paint.good("sealed anew:"),
            sealed.resealed,
            sealed.fingerprint.short(),
            paint.note("from now on start with:"),
            sealed.place.flag(),
            paint.warn("note:"),
        )
    })
}
