//! What every room of one agent shares: who it is, what it holds, and where its rooms meet. No room owns another; they
//! hear of each other's news through what lies here.

use std::{net::IpAddr, path::PathBuf, sync::Arc};

use countersign_api::{
    mesh,
    signals::SignalsRefused,
    svid::{Bundle, SvidError, TlsIdentity},
};
use countersign_core::{
    canonical::Digest,
    identity::{ServiceName, TrustDomain},
};
use parking_lot::Mutex;
use tokio::sync::{Notify, broadcast, watch};
use tonic::transport::Channel;
use zeroize::Zeroizing;

use crate::{
    AgentEvent, ack::Acknowledgements, discovery::Discovery, fresh::Fresh, held::Held, identity::now,
    isolate::Isolation, join::Issued, link::ControlAddress, probe::Probes, report::Reports, signals::Heard,
    telemetry::Telemetry, views::Views, workload_api::peer::Peer,
};

/// Events that a slow listener may fall behind before it misses some.
const EVENTS_KEPT: usize = 1024;

/// One agent.
pub(crate) struct Host {
    pub(crate) name: ServiceName,
    pub(crate) trust_domain: TrustDomain,
    /// The mesh's data directory, which no workload sees.
    pub(crate) data_dir: PathBuf,
    /// The agent's own directory below it.
    pub(crate) dir: PathBuf,
    pub(crate) executable: PathBuf,
    pub(crate) workers: u32,
    pub(crate) isolation: Isolation,
    pub(crate) control: ControlAddress,
    /// Where other hosts reach the proxies of this one.
    pub(crate) address: IpAddr,
    pub(crate) tls: Arc<TlsIdentity>,
    key_pkcs8_der: Mutex<Zeroizing<Vec<u8>>>, // of `tls`'s SVID
    pinned: Option<Digest>,
    pub(crate) bundle: watch::Sender<mesh::Bundle>,
    /// The open channel to control, for questions beside the stream.
    pub(crate) channel: watch::Sender<Option<Channel>>,
    /// How the last attempt to follow control went.
    pub(crate) contact: watch::Sender<Contact>,
    /// Why what control said last was refused, until it is followed again.
    pub(crate) refused: Mutex<Option<String>>,
    /// The agent has a new identity: the stream must be opened again with it.
    pub(crate) renewed: Notify,
    pub(crate) held: Held,
    pub(crate) views: Views,
    pub(crate) discovery: Discovery,
    /// What control revoked.
    pub(crate) signals: Heard,
    pub(crate) acknowledgements: Acknowledgements,
    pub(crate) reports: Arc<Reports>,
    pub(crate) probes: Probes,
    pub(crate) telemetry: Option<Telemetry>,
    pub(crate) fresh: Fresh,
    pub(crate) events: broadcast::Sender<AgentEvent>,
    /// The launchers that were started here.
    launchers: Mutex<Vec<Peer>>,
}

/// Whether control was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Contact {
    /// The first attempt is under way.
    Sought,
    /// It was, and what it said is taken up.
    Followed,
    /// It was not, or it was lost. It is sought on and on.
    Lost,
}

/// What a host is made of.
pub(crate) struct Parts {
    pub(crate) name: ServiceName,
    pub(crate) data_dir: PathBuf,
    pub(crate) dir: PathBuf,
    pub(crate) executable: PathBuf,
    pub(crate) workers: u32,
    pub(crate) isolation: Isolation,
    pub(crate) control: ControlAddress,
    pub(crate) address: IpAddr,
    pub(crate) identity: Issued,
    pub(crate) reports: Arc<Reports>,
    pub(crate) telemetry: Option<Telemetry>,
}

impl Host {
    pub(crate) fn new(parts: Parts) -> Self {
        let Issued { svid, key_pkcs8_der, bundle, pinned } = parts.identity;
        let trust_domain = bundle.trust_domain().clone();
        let (tls, signals) = (TlsIdentity::new(svid, bundle.clone()), Heard::load(&parts.dir));
        tls.heed(signals.now());
        Self {
            held: Held::cold(&parts.dir, trust_domain.clone()),
            fresh: Fresh::load(&parts.dir),
            bundle: watch::Sender::new(bundle.to_message()),
            tls,
            signals,
            key_pkcs8_der: Mutex::new(key_pkcs8_der),
            pinned,
            trust_domain,
            name: parts.name,
            data_dir: parts.data_dir,
            dir: parts.dir,
            executable: parts.executable,
            workers: parts.workers,
            isolation: parts.isolation,
            control: parts.control,
            address: parts.address,
            channel: watch::Sender::new(None),
            contact: watch::Sender::new(Contact::Sought),
            refused: Mutex::default(),
            renewed: Notify::new(),
            views: Views::default(),
            discovery: Discovery::new(),
            acknowledgements: Acknowledgements::default(),
            reports: parts.reports,
            probes: Probes::default(),
            telemetry: parts.telemetry,
            events: broadcast::Sender::new(EVENTS_KEPT),
            launchers: Mutex::default(),
        }
    }

    /// A launcher was started: what descends from it is a workload of this agent.
    pub(crate) fn launches(&self, launcher: u32) {
        let mut launchers = self.launchers.lock();
        launchers.retain(Peer::is_alive);
        launchers.extend(Peer::of_pid(launcher));
    }

    /// Whether a process was started by this agent, or by what it started.
    pub(crate) fn launched(&self, peer: &Peer) -> bool {
        let launchers = self.launchers.lock();
        peer.has_ancestor(|pid| launchers.iter().any(|launcher| launcher.pid() == pid && launcher.is_alive()))
    }

    /// Tells whoever listens. Nobody need.
    pub(crate) fn tell(&self, event: AgentEvent) {
        let _ = self.events.send(event);
    }

    /// Takes a newer bundle of the own trust domain into use, here and in every proxy; an older one is passed over.
    pub(crate) fn trust(&self, message: &mesh::Bundle) -> Result<(), SvidError> {
        let bundle = Bundle::from_message(message)?;
        let newer = bundle.sequence() > self.tls.bundle().sequence() && *bundle.trust_domain() == self.trust_domain;
        if newer {
            tracing::info!(bundle.sequence = bundle.sequence(), "a new bundle is trusted");
            self.tls.trust(bundle);
            self.bundle.send_replace(message.clone());
            self.keep_identity();
        }
        Ok(())
    }

    /// Takes in what control revoked: this process believes none of it any more, and every proxy is told.
    pub(crate) fn heed(&self, message: &mesh::Signals) -> Result<(), SignalsRefused> {
        let signals = self.signals.take_in(message, now().as_secs() * 1000)?;
        self.tls.heed(signals);
        Ok(())
    }

    /// Whether the agent's own identity was revoked: nobody talks to it any more.
    pub(crate) fn is_revoked(&self) -> bool {
        self.tls.svid().serial().is_some_and(|serial| self.signals.now().is_revoked(&serial))
    }

    /// Takes a new identity of the agent into use; connections made from now on show it.
    pub(crate) fn renew(&self, issued: Issued) {
        let Issued { svid, key_pkcs8_der, bundle, pinned: _ } = issued;
        *self.key_pkcs8_der.lock() = key_pkcs8_der;
        self.tls.renew(svid);
        // Verified when it was accepted; of the own trust domain, because the SVID is.
        let _ = self.trust(&bundle.to_message());
        self.keep_identity();
        self.renewed.notify_one();
    }

    /// Writes the identity down. A host that cannot goes on, and has to be invited again after a restart.
    pub(crate) fn keep_identity(&self) {
        let key = self.key_pkcs8_der.lock();
        let (svid, bundle) = (self.tls.svid(), self.tls.bundle());
        if let Err(error) = crate::join::keep_identity(&self.dir, &svid, &key, &bundle, self.pinned) {
            tracing::warn!(%error, dir = %self.dir.display(), "could not keep the agent's identity");
        }
    }
}
