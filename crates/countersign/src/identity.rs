//! `identity list`, `show`: the X.509-SVIDs that were issued and have not expired. `identity revoke`: from now on nobody believes
//! them, and what rests on them is cut.

use clap::{Args, Subcommand};

use countersign_api::local::{IdentityFilter, IdentityView, RevokeAs, Revoked};
use countersign_core::{
    canonical::Digest,
    identity::{InstanceId, ServiceName, SpiffeId},
    signal::Serial,
};

use crate::{
    client::{Client, query},
    error::{Done, Failure},
    mesh_finder::Place,
    render::{self, Output, Paint, cell},
    signal::{self, Because},
};

/// What can be done with identities.
#[derive(Debug, Subcommand)]
pub enum IdentityVerb {
    /// List those that have not expired
    List {
        /// Which ones.
        #[command(flatten)]
        which: Which,
    },
    /// Show one
    Show {
        /// Its serial number
        serial: Serial,
    },
    /// Make some good for nothing from now on, and cut what rests on them
    ///
    /// A workload whose identity is revoked gets another at once, with another key, as long as it may have one: what was
    /// copied is worth nothing, and the service goes on. A host whose own identity is revoked (`--host`) has to be
    /// invited again.
    Revoke {
        /// Which ones.
        #[command(flatten)]
        which: Which,
        /// Why, and who asks.
        #[command(flatten)]
        because: Because,
    },
}

/// Which identities are meant: those for which all of it holds.
#[derive(Debug, Clone, Args)]
pub struct Which {
    /// The one with this serial number
    #[arg(long, value_name = "NUMBER")]
    serial: Option<Serial>,
    /// Those that name this workload: `spiffe://shop.example/web`
    #[arg(long, value_name = "SPIFFE-ID")]
    id: Option<SpiffeId>,
    /// Those of this instance
    #[arg(long, value_name = "INSTANCE", value_parser = InstanceId::parse)]
    instance: Option<InstanceId>,
    /// Those issued to this host, its agent's own among them
    #[arg(long, value_name = "HOST")]
    host: Option<ServiceName>,
    /// Those of this key: SHA-256 of its SubjectPublicKeyInfo
    #[arg(long, value_name = "SHA-256", value_parser = digest)]
    key: Option<Digest>,
    /// Those that rest on this root: its number, as `authority show` says it
    #[arg(long, value_name = "ROOT")]
    authority: Option<u32>,
}

fn digest(given: &str) -> Result<Digest, String> {
    given.parse().map_err(|_| "a SHA-256 has 64 hexadecimal digits".to_owned())
}

impl Which {
    fn filter(self) -> IdentityFilter {
        let Self { serial, id, instance, host, key, authority } = self;
        IdentityFilter { serial, id, instance, host, key, authority }
    }
}

/// Lists them.
pub async fn list(place: &Place, which: Which, output: Output) -> Done {
    let found = ask(&Client::control(place), &which.filter()).await?;
    render::answer(output, &found, |found, paint| match found.is_empty() {
        true => "none that has not expired\n".to_owned(),
        false => table(found, paint),
    })
}

/// Shows one.
pub async fn show(place: &Place, serial: Serial, output: Output) -> Done {
    let filter = IdentityFilter { serial: Some(serial), ..IdentityFilter::default() };
    let found = ask(&Client::control(place), &filter).await?.into_iter().next();
    let found = found.ok_or_else(|| {
        Failure::new(format!("no identity that has not expired has the serial number {serial}"))
            .help("`countersign identity list` shows them")
    })?;
    render::answer(output, &found, |one, paint| {
        let now_ms = render::now_ms();
        let absent = || "-".to_owned();
        let mut lines = vec![
            ("serial", one.serial.to_string()),
            ("id", one.id.to_string()),
            ("instance", one.instance.as_ref().map_or_else(absent, InstanceId::to_string)),
            ("host", one.host.as_ref().map_or_else(absent, ServiceName::to_string)),
            ("key", one.key.as_ref().map_or_else(absent, Digest::to_string)),
            ("issued", render::distance(one.issued_at_ms, now_ms)),
            ("expires", render::distance(one.expires_at_ms, now_ms)),
            ("root", one.authority.to_string()),
        ];
        if let Some(by) = &one.revoked {
            let reason = render::tame(&by.reason);
            lines.push(("revoked", format!("{} by {}: {reason}", render::distance(by.at_ms, now_ms), by.by)));
        }
        lines.iter().map(|(name, value)| format!("{} {value}\n", paint.dim(&format!("{name:<8}")))).collect()
    })
}

/// Revokes some, and waits until every connected proxy enforces it.
pub async fn revoke(place: &Place, which: Which, because: Because, output: Output) -> Done {
    let Because { reason, timeout, asker } = because;
    let control = Client::control(place);
    let asked = RevokeAs { identities: which.filter(), reason, shown: asker.shown() };
    let revoked: Revoked = control.post("/v1/identities/revoke", &asked).await?;
    let waited = signal::wait(&control, revoked.signal, timeout).await?;
    render::answer(output, &revoked, |revoked, paint| {
        let count = revoked.identities.len();
        format!(
            "{} {count} identities, by signal {}\n{}",
            paint.good("revoked:"),
            revoked.signal.0,
            table(&revoked.identities, paint)
        )
    })?;
    signal::say(&waited, output)
}

async fn ask(control: &Client, filter: &IdentityFilter) -> Result<Vec<IdentityView>, Failure> {
    let asked = query([
        ("serial", filter.serial.map(|serial| serial.to_string())),
        ("id", filter.id.as_ref().map(SpiffeId::to_string)),
        ("host", filter.host.as_ref().map(ServiceName::to_string)),
        ("key", filter.key.map(|key| key.to_string())),
        ("authority", filter.authority.map(|root| root.to_string())),
    ]);
    control.get(&format!("/v1/identities{asked}")).await
}

fn table(identities: &[IdentityView], paint: Paint) -> String {
    let now_ms = render::now_ms();
    let row = |one: &IdentityView| {
        vec![
            cell(one.serial),
            cell(one.instance.as_ref().map_or(one.id.as_str(), InstanceId::as_str)),
            cell(one.host.as_ref().map_or("-", ServiceName::as_str)),
            cell(render::distance(one.issued_at_ms, now_ms)),
            cell(render::distance(one.expires_at_ms, now_ms)),
            cell(one.revoked.as_ref().map_or_else(String::new, |by| format!("by {}", by.by))),
        ]
    };
    render::table(&["SERIAL", "INSTANCE", "HOST", "ISSUED", "EXPIRES", "REVOKED"], identities.iter().map(row), paint)
}
