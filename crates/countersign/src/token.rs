//! `token list`, `show`: the access tokens that were issued and have not expired; the tokens themselves are nowhere. `token inspect`:
//! what one says, and whether it would be believed. `token revoke`: from now on nobody believes them, and what was permitted with one is cut.

use std::io::Read as _;

use clap::{ArgGroup, Args, Subcommand};

use countersign_api::local::{InspectToken, RevokeTokensAs, TokenFilter, TokenInspected, TokenView, TokensRevoked};
use countersign_core::{
    gate::act::Act,
    identity::{InstanceId, ServiceName},
    signal::TokensMeant,
    token::{Thumbprint, TokenId},
};

use crate::{
    client::{Client, query},
    error::{Done, Failure},
    mesh_finder::Place,
    operator::Asker,
    render::{self, Output, Paint, cell},
    signal::{self, Because},
};

/// Bytes of standard input that may be a token: more than any has.
const INPUT_BYTES_MAX: u64 = 64 * 1024;

/// What can be done with access tokens.
#[derive(Debug, Subcommand)]
pub enum TokenVerb {
    /// List those that have not expired
    List {
        /// Which ones.
        #[command(flatten)]
        which: Which,
        /// Who asks.
        #[command(flatten)]
        asker: Asker,
    },
    /// Show one
    Show {
        /// Its id
        id: TokenId,
        /// Who asks.
        #[command(flatten)]
        asker: Asker,
    },
    /// Explain a token: what it says, and whether it would be believed now, and why not
    ///
    /// It is read from standard input, where no list of processes and no history of a shell shows it.
    Inspect {
        /// Who asks.
        #[command(flatten)]
        asker: Asker,
    },
    /// Make some good for nothing from now on, and cut what was permitted with them
    ///
    /// Those that were issued until now are meant. A workload whose token is revoked gets another at once, as long as it may
    /// have one: what was copied is worth nothing, and the service goes on. `service suspend` takes a service out.
    Revoke {
        /// Which ones.
        #[command(flatten)]
        meant: Meant,
        /// Why, and who asks.
        #[command(flatten)]
        because: Because,
    },
}

/// Which tokens are listed: those for which all of it holds.
#[derive(Debug, Clone, Args)]
pub struct Which {
    /// Those about this service, as the caller
    #[arg(long, value_name = "SERVICE")]
    subject: Option<ServiceName>,
    /// Those for this service, as the callee
    #[arg(long, value_name = "SERVICE")]
    service: Option<ServiceName>,
    /// Those of this instance
    #[arg(long, value_name = "INSTANCE", value_parser = InstanceId::parse)]
    instance: Option<InstanceId>,
    /// Those that this host holds
    #[arg(long, value_name = "HOST")]
    host: Option<ServiceName>,
}

/// Which tokens are revoked: one of these.
#[derive(Debug, Clone, Args)]
#[command(group = ArgGroup::new("meant").required(true).multiple(false))]
pub struct Meant {
    /// The one with this id
    #[arg(long, value_name = "ID", group = "meant")]
    id: Option<TokenId>,
    /// That one and all that were renewed from it
    #[arg(long, value_name = "ID", group = "meant")]
    family: Option<TokenId>,
    /// Those about this service, as the caller
    #[arg(long, value_name = "SERVICE", group = "meant")]
    subject: Option<ServiceName>,
    /// Those for this service, as the callee
    #[arg(long, value_name = "SERVICE", group = "meant")]
    service: Option<ServiceName>,
    /// Those of this instance
    #[arg(long, value_name = "INSTANCE", group = "meant", value_parser = InstanceId::parse)]
    instance: Option<InstanceId>,
    /// Those that this client outside the mesh asked for, or that are about it
    #[arg(long, value_name = "CLIENT", group = "meant")]
    client: Option<ServiceName>,
    /// Those bound to this certificate, or to this key of proofs: SHA-256 of its DER, or of its JWK, base64url
    #[arg(long, value_name = "THUMBPRINT", group = "meant")]
    key: Option<Thumbprint>,
    /// Every one
    #[arg(long, group = "meant")]
    all: bool,
}

impl Meant {
    fn meant(self) -> TokensMeant {
        let Self { id, family, subject, service, instance, client, key, all: _ } = self;
        // One of them is given: the parser sees to it.
        id.map(TokensMeant::Id)
            .or(family.map(TokensMeant::Family))
            .or(subject.map(TokensMeant::Subject))
            .or(service.map(TokensMeant::Audience))
            .or(instance.map(TokensMeant::Instance))
            .or(client.map(TokensMeant::Client))
            .or(key.map(TokensMeant::Key))
            .unwrap_or(TokensMeant::All)
    }
}

/// Lists them.
pub async fn list(place: &Place, which: Which, asker: &Asker, output: Output) -> Done {
    let Which { subject, service, instance, host } = which;
    let found = ask(place, &TokenFilter { id: None, subject, service, instance, host }, asker).await?;
    render::answer(output, &found, |found, paint| match found.is_empty() {
        true => "none that has not expired: no service demands them, or none that does is declared as an upstream\n"
            .to_owned(),
        false => table(found, paint),
    })
}

/// Shows one.
pub async fn show(place: &Place, id: TokenId, asker: &Asker, output: Output) -> Done {
    let filter = TokenFilter { id: Some(id), ..TokenFilter::default() };
    let found = ask(place, &filter, asker).await?.into_iter().next();
    let found = found.ok_or_else(|| {
        Failure::new(format!("no access token that has not expired has the id {id}"))
            .help("`countersign token list` shows them")
    })?;
    render::answer(output, &found, |one, paint| {
        let now_ms = render::now_ms();
        let lines = [
            ("id", one.id.to_string()),
            ("family", one.family.to_string()),
            ("subject", one.subject.to_string()),
            ("service", one.service.to_string()),
            ("scope", render::tame(&one.scope.to_string())),
            ("instance", one.instance.as_ref().map_or_else(|| "none: a client's".to_owned(), InstanceId::to_string)),
            ("host", one.host.as_ref().map_or_else(|| "none".to_owned(), ServiceName::to_string)),
            ("bound to", bound_to(one)),
            ("issued", render::distance(one.issued_at_ms, now_ms)),
            ("expires", render::distance(one.expires_at_ms, now_ms)),
            ("revoked", if one.revoked { "yes" } else { "no" }.to_owned()),
        ];
        lines.iter().map(|(name, value)| format!("{} {value}\n", paint.dim(&format!("{name:<8}")))).collect()
    })
}

/// Explains the one that stands in standard input.
pub async fn inspect(place: &Place, asker: &Asker, output: Output) -> Done {
    let mut token = String::new();
    let read = std::io::stdin().take(INPUT_BYTES_MAX).read_to_string(&mut token);
    read.map_err(|error| Failure::new(format!("standard input cannot be read: {error}")))?;
    let token = token.trim().to_owned();
    if token.is_empty() {
        let help = "pipe it in: `countersign token inspect < token`";
        return Err(Failure::new("standard input holds no token").help(help));
    }
    let control = asker.opens(Client::control(place), Act::ReadTokens).await?;
    let found: TokenInspected = control.post("/v1/tokens/inspect", &InspectToken { token }).await?;
    render::answer(output, &found, explain)
}

fn explain(found: &TokenInspected, paint: Paint) -> String {
    let now_ms = render::now_ms();
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        text += &format!("{} {}\n", paint.dim(&format!("{name:<9}")), render::tame(value));
    };
    for (part, value) in [("header", &found.header), ("claims", &found.claims)] {
        match value.as_object() {
            None => line(part, "cannot be read"),
            Some(members) => members.iter().for_each(|(name, value)| {
                let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                line(name, &value);
            }),
        }
    }
    if let Some(issued) = &found.issued {
        let to = issued.host.as_ref().map_or_else(String::new, |host| format!(", to host {host}"));
        let (at, expires) =
            (render::distance(issued.issued_at_ms, now_ms), render::distance(issued.expires_at_ms, now_ms));
        line("issued", &format!("{at}{to}; expires {expires}"));
    }
    let verdict = match found.fault {
        None => {
            format!("{} by the service that it is for, of whoever holds the key it is bound to", paint.good("believed"))
        }
        Some(fault) => format!("{} {}", paint.bad("not believed:"), fault.in_words()),
    };
    text + &verdict + "\n"
}

/// Revokes some, and waits until every connected proxy enforces it.
pub async fn revoke(place: &Place, meant: Meant, because: Because, output: Output) -> Done {
    let Because { reason, timeout, asker } = because;
    let control = Client::control(place);
    let asked = RevokeTokensAs { meant: meant.meant(), reason, shown: asker.shown() };
    let revoked: TokensRevoked = control.post("/v1/tokens/revoke", &asked).await?;
    let waited = signal::wait(&control, revoked.signal, timeout).await?;
    render::answer(output, &revoked, |revoked, paint| {
        format!("{} {}, by signal {}\n", paint.good("revoked:"), revoked.meant, revoked.signal.0)
    })?;
    signal::say(&waited, output)
}

async fn ask(place: &Place, filter: &TokenFilter, asker: &Asker) -> Result<Vec<TokenView>, Failure> {
    let asked = query([
        ("id", filter.id.map(|id| id.to_string())),
        ("subject", filter.subject.as_ref().map(ServiceName::to_string)),
        ("service", filter.service.as_ref().map(ServiceName::to_string)),
        ("instance", filter.instance.as_ref().map(InstanceId::to_string)),
        ("host", filter.host.as_ref().map(ServiceName::to_string)),
    ]);
    asker.opens(Client::control(place), Act::ReadTokens).await?.get(&format!("/v1/tokens{asked}")).await
}

fn bound_to(one: &TokenView) -> String {
    match (&one.certificate, &one.key) {
        (Some(certificate), _) => format!("certificate {certificate}"),
        (None, Some(key)) => format!("key {key}"),
        (None, None) => "nothing".to_owned(),
    }
}

fn table(tokens: &[TokenView], paint: Paint) -> String {
    let now_ms = render::now_ms();
    let row = |one: &TokenView| {
        vec![
            cell(one.id),
            one.instance.as_ref().map_or_else(|| cell(&one.subject), cell),
            cell(&one.service),
            cell(render::tame(&one.scope.to_string())),
            cell(render::distance(one.expires_at_ms, now_ms)),
            cell(if one.revoked { "revoked" } else { "" }),
        ]
    };
    render::table(&["ID", "INSTANCE", "FOR", "SCOPE", "EXPIRES", ""], tokens.iter().map(row), paint)
}
