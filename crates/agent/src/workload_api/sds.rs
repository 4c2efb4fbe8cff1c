//! Envoy's Secret Discovery Service, so that an Envoy has the identity of its workload with no certificate in a file: the certificate it
//! shows, and what verifies its peers, again whenever one of them changes. Secrets are called as SPIRE's agent calls them, so a
//! configuration that was written for SPIRE needs another socket and nothing else.
//!
//! Standard: the xDS protocol, "State of the World": an answer stands until the next one; each has a nonce, and a request that repeats it
//! takes that answer up, or refuses it when it repeats another version. Envoy sends no header of SPIFFE's, so none is asked for.

use std::collections::BTreeSet;

use countersign_api::{
    sds::{
        CertificateValidationContext, DataSource, DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest,
        DiscoveryResponse, Node, SECRET_TYPE, SPIFFE_VALIDATOR, SPIFFE_VALIDATOR_TYPE, Secret,
        SpiffeCertValidatorConfig, TlsCertificate, TypedExtensionConfig, data_source::Specifier, secret,
        secret_discovery_service_server::SecretDiscoveryService, spiffe_cert_validator_config::TrustDomain,
    },
    svid::{Bundle, pem},
};
use countersign_core::identity::SpiffeId;
use futures_util::StreamExt;
use prost::Message;
use prost_types::{Any, value::Kind};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::{
    join::Issued,
    workload_api::{Answers, Api, Facts, Watched},
};

/// Longest request, in bytes: the first one of an Envoy lists all that was built into it.
pub(super) const MESSAGE_BYTES_MAX: usize = 512 * 1024;
/// Names in one request at most.
const NAMES_MAX: usize = 16;
/// Longest reason of a refusal that is written down, in characters.
const REASON_CHARS_MAX: usize = 512;

/// The certificate of whoever asks.
const OWN_CERTIFICATE: &str = "default";
/// What verifies certificates of the own trust domain.
const OWN_BUNDLE: &str = "ROOTCA";
/// What verifies certificates of every trust domain that is trusted.
const ALL_BUNDLES: &str = "ALL";
/// No certificate is of this trust domain (RFC 2606, 2).
const NOBODY: &str = "invalid";
/// Envoys older than this (major, minor) have no validator for SPIFFE.
const SPIFFE_VALIDATOR_SINCE: (u32, u32) = (1, 18);

#[tonic::async_trait]
impl SecretDiscoveryService for Api {
    type StreamSecretsStream = Answers<DiscoveryResponse>;
    type DeltaSecretsStream = Answers<DeltaDiscoveryResponse>;

    async fn stream_secrets(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamSecretsStream>, Status> {
        let watched = self.attest(&request)?;
        let (tell, answers) = mpsc::channel(1);
        tokio::spawn(async move {
            if let Err(status) = converse(watched, request.into_inner(), &tell).await {
                let _ = tell.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn fetch_secrets(&self, request: Request<DiscoveryRequest>) -> Result<Response<DiscoveryResponse>, Status> {
        let mut watched = self.attest(&request)?;
        let mut subscription = Subscription::default();
        subscription.hear(request.into_inner())?;
        let answer = subscription.answer_with(&mut watched).await?;
        answer.map(Response::new).ok_or_else(|| Status::internal("a first answer is always one"))
    }

    async fn delta_secrets(
        &self,
        _: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaSecretsStream>, Status> {
        Err(Status::unimplemented("secrets are told whole: use `api_type: GRPC`, not `DELTA_GRPC`"))
    }
}

/// Returns when nobody listens any more, or with why there is no more to tell.
async fn converse(
    mut watched: Watched,
    mut asked: Streaming<DiscoveryRequest>,
    tell: &mpsc::Sender<Result<DiscoveryResponse, Status>>,
) -> Result<(), Status> {
    let mut subscription = Subscription::default();
    loop {
        tokio::select! {
            () = tell.closed() => return Ok(()),
            request = asked.next() => match request {
                Some(Ok(request)) => subscription.hear(request)?,
                Some(Err(_)) | None => return Ok(()),
            },
            () = watched.changed() => {}
        }
        let (answer, end) = match subscription.answer_with(&mut watched).await {
            Ok(answer) => (answer, None),
            // An Envoy keeps what it was told last when a stream ends.
            Err(status) if status.code() == Code::PermissionDenied => {
                let (own, bundle) = (watched.material.id(), watched.host.tls.bundle());
                let nobody = subscription.answer(|wanted| Ok(wanted.nobody(&own, &bundle)))?;
                (nobody.filter(|answer| !answer.resources.is_empty()), Some(status))
            }
            Err(status) => return Err(status),
        };
        if let Some(answer) = answer
            && tell.send(Ok(answer)).await.is_err()
        {
            return Ok(());
        }
        if let Some(status) = end {
            return Err(status);
        }
    }
}

/// What one Envoy asks for on one stream, and what it was told last.
#[derive(Default)]
struct Subscription {
    wanted: Option<Wanted>,
    told: Option<Vec<Secret>>,
    version: u64,
    nonce: String,
}

/// What an Envoy asks for.
#[derive(Default, Clone, PartialEq)]
struct Wanted {
    /// Everything when it is empty.
    names: BTreeSet<String>,
    /// It has a validator for SPIFFE, and wants that.
    has_validator: bool,
}

impl Subscription {
    /// Takes in a request. One that answers another answer than the last is passed over: it was under way when that was sent.
    fn hear(&mut self, request: DiscoveryRequest) -> Result<(), Status> {
        let DiscoveryRequest { version_info, node, resource_names, type_url, response_nonce, error_detail } = request;
        if !type_url.is_empty() && type_url != SECRET_TYPE {
            return Err(Status::invalid_argument("only secrets are told here"));
        }
        if resource_names.len() > NAMES_MAX {
            return Err(Status::invalid_argument(format!("ask for at most {NAMES_MAX} secrets at once")));
        }
        if self.version > 0 {
            if response_nonce != self.nonce {
                return Ok(());
            }
            if version_info != self.version.to_string() {
                let why = error_detail.map(|status| status.message).unwrap_or_default();
                let why: String = why.chars().take(REASON_CHARS_MAX).collect();
                tracing::warn!(names = ?resource_names, why = ?why, "an Envoy does not take up the secrets that it asked for");
            }
        }
        // Only the first request of a stream need say what the Envoy is.
        let has_validator = match (node, &self.wanted) {
            (Some(node), _) => has_validator(&node),
            (None, Some(wanted)) => wanted.has_validator,
            (None, None) => false,
        };
        let wanted = Wanted { names: resource_names.into_iter().collect(), has_validator };
        if self.wanted.as_ref() != Some(&wanted) {
            (self.wanted, self.told) = (Some(wanted), None);
        }
        Ok(())
    }

    /// What is new to it, with an identity issued for that if need be. Who asked is looked at again.
    async fn answer_with(&mut self, watched: &mut Watched) -> Result<Option<DiscoveryResponse>, Status> {
        let own = watched.material.id();
        if self.wanted.as_ref().is_some_and(|wanted| wanted.needs_svid(&own)) {
            watched.seek_svid().await?;
        }
        let facts = watched.look()?;
        self.answer(|wanted| wanted.secrets(&own, &facts))
    }

    /// What `make` makes of what it asked for, if that is not what it was told last.
    fn answer(
        &mut self,
        make: impl FnOnce(&Wanted) -> Result<Vec<Secret>, Status>,
    ) -> Result<Option<DiscoveryResponse>, Status> {
        let Some(wanted) = &self.wanted else { return Ok(None) };
        let secrets = make(wanted)?;
        if self.told.as_ref() == Some(&secrets) {
            return Ok(None);
        }
        self.version += 1;
        self.nonce = format!("{:016x}", fastrand::u64(..));
        let resources = secrets.iter().map(|secret| any(SECRET_TYPE, secret)).collect();
        self.told = Some(secrets);
        Ok(Some(DiscoveryResponse {
            version_info: self.version.to_string(),
            resources,
            type_url: SECRET_TYPE.into(),
            nonce: self.nonce.clone(),
        }))
    }
}

/// What a name stands for.
enum Named {
    Certificate,
    Bundle,
}

impl Wanted {
    fn named(name: &str, own: &SpiffeId) -> Option<Named> {
        match name {
            OWN_CERTIFICATE => Some(Named::Certificate),
            OWN_BUNDLE | ALL_BUNDLES => Some(Named::Bundle),
            id if id == own.to_string() => Some(Named::Certificate),
            id if id == own_trust_domain(own) => Some(Named::Bundle),
            _ => None,
        }
    }

    /// The names, or those of everything there is.
    fn names(&self, own: &SpiffeId) -> BTreeSet<String> {
        match self.names.is_empty() {
            true => [own.to_string(), own_trust_domain(own)].into(),
            false => self.names.clone(),
        }
    }

    fn needs_svid(&self, own: &SpiffeId) -> bool {
        self.names(own).iter().any(|name| matches!(Self::named(name, own), Some(Named::Certificate)))
    }

    /// The secrets that it asks for, all of them or none: a name that is not its own is refused as whoever it names.
    fn secrets(&self, own: &SpiffeId, facts: &Facts) -> Result<Vec<Secret>, Status> {
        let secret = |name: String| {
            let secret = match Self::named(&name, own) {
                Some(Named::Certificate) => {
                    let svid = facts.svid.as_deref();
                    certificate(svid.ok_or_else(|| Status::internal("an identity was not sought"))?)
                }
                Some(Named::Bundle) => self.validation(own.trust_domain(), &facts.bundle),
                None => {
                    let what = format!("this workload is `{own}`; it is not given the secret `{name}`");
                    return Err(Status::invalid_argument(what));
                }
            };
            Ok(Secret { name, r#type: Some(secret) })
        };
        self.names(own).into_iter().map(secret).collect()
    }

    /// In the place of each bundle one that verifies nobody: what an Envoy is told whose workload has no identity any more.
    fn nobody(&self, own: &SpiffeId, bundle: &Bundle) -> Vec<Secret> {
        let is_bundle = |name: &String| self.has_validator && matches!(Self::named(name, own), Some(Named::Bundle));
        let secret = |name| Secret { name, r#type: Some(self.validation(NOBODY, bundle)) };
        self.names(own).into_iter().filter(is_bundle).map(secret).collect()
    }

    /// "SPIFFE requires that a peer's certificate is verified by the bundle of the trust domain that it names": Envoy's validator for SPIFFE
    /// does that. Without it any certificate of these authorities verifies, and whom it names is for the Envoy's own configuration.
    fn validation(&self, trust_domain: &str, bundle: &Bundle) -> secret::Type {
        let authorities: String = bundle.authorities().iter().map(|der| pem("CERTIFICATE", der)).collect();
        let context = match self.has_validator {
            true => {
                let trust_domain =
                    TrustDomain { name: trust_domain.to_owned(), trust_bundle: inline(authorities.into_bytes()) };
                let config = SpiffeCertValidatorConfig { trust_domains: vec![trust_domain] };
                let typed_config = Some(any(SPIFFE_VALIDATOR_TYPE, &config));
                let validator = TypedExtensionConfig { name: SPIFFE_VALIDATOR.into(), typed_config };
                CertificateValidationContext { trusted_ca: None, custom_validator_config: Some(validator) }
            }
            false => CertificateValidationContext {
                trusted_ca: inline(authorities.into_bytes()),
                custom_validator_config: None,
            },
        };
        secret::Type::ValidationContext(context)
    }
}

/// The id of a trust domain, by which its bundle is called.
fn own_trust_domain(own: &SpiffeId) -> String {
    format!("spiffe://{}", own.trust_domain())
}

fn certificate(issued: &Issued) -> secret::Type {
    let chain: String = issued.svid.chain().iter().map(|der| pem("CERTIFICATE", der)).collect();
    let key = pem("PRIVATE KEY", &issued.key_pkcs8_der);
    secret::Type::TlsCertificate(TlsCertificate {
        certificate_chain: inline(chain.into_bytes()),
        private_key: inline(key.into_bytes()),
    })
}

fn inline(bytes: Vec<u8>) -> Option<DataSource> {
    Some(DataSource { specifier: Some(Specifier::InlineBytes(bytes.into())) })
}

fn any(type_url: &str, message: &impl Message) -> Any {
    Any { type_url: type_url.into(), value: message.encode_to_vec() }
}

/// Whether an Envoy has a validator for SPIFFE and does not ask to be left without it, as it would ask SPIRE's agent.
fn has_validator(node: &Node) -> bool {
    let version = node.user_agent_build_version.as_ref().and_then(|build| build.version.as_ref());
    let is_new = version.is_some_and(|it| (it.major_number, it.minor_number) >= SPIFFE_VALIDATOR_SINCE);
    let disabled = node.metadata.as_ref().and_then(|metadata| metadata.fields.get("disable_spiffe_cert_validation"));
    let is_disabled = match disabled.and_then(|value| value.kind.as_ref()) {
        Some(Kind::BoolValue(disabled)) => *disabled,
        Some(Kind::StringValue(disabled)) => disabled == "true",
        _ => false,
    };
    is_new && !is_disabled
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use countersign_api::{
        sds::{BuildVersion, SemanticVersion},
        svid::X509Svid,
    };
    use countersign_testkit::authority::Authority;
    use prost_types::Struct;
    use rustls_pki_types::pem::PemObject;

    use super::*;

    fn own() -> SpiffeId {
        SpiffeId::parse("spiffe://shop.example/edge").unwrap()
    }

    fn facts() -> Facts {
        let authority = Authority::new("shop.example");
        let issued = authority.issue(&own());
        let bundle = Bundle::from_message(&authority.bundle()).unwrap();
        let svid = X509Svid::parse(issued.chain, issued.key.clone()).unwrap();
        let svid = Issued { svid, key_pkcs8_der: issued.key.into(), bundle: bundle.clone(), pinned: None };
        Facts { svid: Some(Arc::new(svid)), bundle: Arc::new(bundle) }
    }

    /// An Envoy of this version; with what it says of SPIFFE's validator in its metadata.
    fn node(version: Option<(u32, u32)>, disable: Option<Kind>) -> Node {
        let version = version.map(|(major_number, minor_number)| BuildVersion {
            version: Some(SemanticVersion { major_number, minor_number, patch: 0 }),
        });
        let disable = disable.map(|kind| {
            let value = prost_types::Value { kind: Some(kind) };
            Struct { fields: [("disable_spiffe_cert_validation".to_owned(), value)].into() }
        });
        Node { id: "edge-1".into(), metadata: disable, user_agent_build_version: version }
    }

    fn asks(names: &[&str], node: Option<Node>) -> DiscoveryRequest {
        let resource_names = names.iter().map(|name| (*name).to_owned()).collect();
        DiscoveryRequest { resource_names, node, type_url: SECRET_TYPE.into(), ..DiscoveryRequest::default() }
    }

    fn wanted(names: &[&str], node: Node) -> Wanted {
        let mut subscription = Subscription::default();
        subscription.hear(asks(names, Some(node))).unwrap();
        subscription.wanted.unwrap()
    }

    /// What a secret is, in a word.
    fn word(secret: &Secret) -> String {
        let bytes = |source: &Option<DataSource>| {
            let Some(DataSource { specifier: Some(Specifier::InlineBytes(bytes)) }) = source else {
                panic!("not inline")
            };
            bytes.clone()
        };
        let certificates = |source: &Option<DataSource>| {
            let pem = bytes(source);
            rustls_pki_types::CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>().unwrap().len()
        };
        let is = match secret.r#type.as_ref().unwrap() {
            secret::Type::TlsCertificate(own) => {
                rustls_pki_types::PrivateKeyDer::from_pem_slice(&bytes(&own.private_key)).unwrap();
                format!("certificate of {}", certificates(&own.certificate_chain))
            }
            secret::Type::ValidationContext(context) => match &context.custom_validator_config {
                Some(validator) => {
                    assert_eq!((validator.name.as_str(), &context.trusted_ca), (SPIFFE_VALIDATOR, &None));
                    let config = validator.typed_config.as_ref().unwrap();
                    assert_eq!(config.type_url, SPIFFE_VALIDATOR_TYPE);
                    let config = SpiffeCertValidatorConfig::decode(&config.value[..]).unwrap();
                    let [domain] = &config.trust_domains[..] else { panic!("not one trust domain") };
                    format!("SPIFFE {} by {}", domain.name, certificates(&domain.trust_bundle))
                }
                None => format!("any by {}", certificates(&context.trusted_ca)),
            },
        };
        format!("{} = {is}", secret.name)
    }

    #[test]
    fn secrets_are_called_as_spires_agent_calls_them_and_verify_as_the_node_can() {
        let facts = facts();
        let new = || node(Some((1, 40)), None);
        let says = |kind| node(Some((1, 40)), Some(kind));
        let (id, domain) = ("spiffe://shop.example/edge", "spiffe://shop.example");
        let cases: &[(&[&str], Node, &[&str])] = &[
            (&["default"], new(), &["default = certificate of 2"]),
            (&[id], new(), &["spiffe://shop.example/edge = certificate of 2"]),
            (&["ROOTCA"], new(), &["ROOTCA = SPIFFE shop.example by 1"]),
            (
                &["ALL", domain],
                new(),
                &["ALL = SPIFFE shop.example by 1", "spiffe://shop.example = SPIFFE shop.example by 1"],
            ),
            (
                &[],
                new(),
                &["spiffe://shop.example = SPIFFE shop.example by 1", "spiffe://shop.example/edge = certificate of 2"],
            ),
            (&["ROOTCA"], node(Some((1, 17)), None), &["ROOTCA = any by 1"]),
            (&["ROOTCA"], node(Some((1, 18)), None), &["ROOTCA = SPIFFE shop.example by 1"]),
            (&["ROOTCA"], node(Some((2, 0)), None), &["ROOTCA = SPIFFE shop.example by 1"]),
            (&["ROOTCA"], node(None, None), &["ROOTCA = any by 1"]),
            (&["ROOTCA"], says(Kind::BoolValue(true)), &["ROOTCA = any by 1"]),
            (&["ROOTCA"], says(Kind::StringValue("true".into())), &["ROOTCA = any by 1"]),
            (&["ROOTCA"], says(Kind::BoolValue(false)), &["ROOTCA = SPIFFE shop.example by 1"]),
        ];
        for (names, node, expected) in cases {
            let wanted = wanted(names, node.clone());
            let told = wanted.secrets(&own(), &facts).unwrap();
            assert_eq!(told.iter().map(word).collect::<Vec<_>>(), *expected, "{names:?} {node:?}");
            assert_eq!(
                wanted.needs_svid(&own()),
                expected.iter().any(|said| said.contains("certificate")),
                "{names:?}"
            );
        }
    }

    #[test]
    fn the_secret_of_somebody_else_is_refused_and_nothing_comes_with_it() {
        for names in [
            &["spiffe://shop.example/payments"][..],
            &["default", "spiffe://shop.example/payments"],
            &["spiffe://partner.example"],
            &["default "],
            &["spiffe://shop.example", ""],
        ] {
            let refused = wanted(names, node(Some((1, 40)), None)).secrets(&own(), &facts()).unwrap_err();
            assert_eq!(refused.code(), Code::InvalidArgument, "{names:?}");
        }
    }

    #[test]
    fn an_envoy_that_lost_its_identity_verifies_nobody_and_without_the_validator_is_told_nothing() {
        let bundle = facts().bundle;
        let told =
            |names: &[&str], node| wanted(names, node).nobody(&own(), &bundle).iter().map(word).collect::<Vec<_>>();
        assert_eq!(told(&["ROOTCA", "default"], node(Some((1, 40)), None)), ["ROOTCA = SPIFFE invalid by 1"]);
        assert!(told(&["ROOTCA"], node(None, None)).is_empty());
        assert!(told(&["default"], node(Some((1, 40)), None)).is_empty());
    }

    #[test]
    fn an_answer_is_sent_for_what_is_new_and_for_no_acknowledgement() {
        let mut subscription = Subscription::default();
        let secrets = |serial: u8| {
            vec![Secret {
                name: "default".into(),
                r#type: Some(secret::Type::TlsCertificate(TlsCertificate {
                    certificate_chain: inline(vec![serial]),
                    private_key: None,
                })),
            }]
        };
        let answers = |subscription: &mut Subscription, serial| subscription.answer(|_| Ok(secrets(serial))).unwrap();
        let reply = |to: &DiscoveryResponse, version: &str, names: &[&str]| DiscoveryRequest {
            version_info: version.into(),
            response_nonce: to.nonce.clone(),
            ..asks(names, None)
        };
        assert_eq!(answers(&mut subscription, 1), None, "nobody asked");
        subscription.hear(asks(&["default"], Some(node(Some((1, 40)), None)))).unwrap();
        let first = answers(&mut subscription, 1).unwrap();
        assert_eq!((first.version_info.as_str(), first.type_url.as_str()), ("1", SECRET_TYPE));
        assert_eq!(answers(&mut subscription, 1), None, "it was told that");
        subscription.hear(reply(&first, "1", &["default"])).unwrap();
        assert_eq!(answers(&mut subscription, 1), None, "it took that up");
        let second = answers(&mut subscription, 2).unwrap();
        assert_ne!(second.nonce, first.nonce);
        subscription.hear(reply(&first, "1", &["ROOTCA"])).unwrap();
        assert_eq!(answers(&mut subscription, 2), None, "it had not seen the second answer yet");
        subscription.hear(reply(&second, "1", &["default"])).unwrap();
        assert_eq!(answers(&mut subscription, 2), None, "what it refused is not sent again");
        subscription.hear(reply(&second, "1", &["ROOTCA"])).unwrap();
        let third = answers(&mut subscription, 2).unwrap();
        assert_eq!(third.version_info, "3", "it asks for something else");
        let wanted = subscription.wanted.as_ref().unwrap();
        assert!(wanted.has_validator, "the node was said once");
    }

    #[test]
    fn what_is_no_request_for_secrets_or_asks_for_too_many_is_refused() {
        let cluster = DiscoveryRequest {
            type_url: "type.googleapis.com/envoy.config.cluster.v3.Cluster".into(),
            ..DiscoveryRequest::default()
        };
        let many = asks(&["default"; NAMES_MAX + 1], None);
        for request in [cluster, many] {
            assert_eq!(Subscription::default().hear(request).unwrap_err().code(), Code::InvalidArgument);
        }
    }
}
