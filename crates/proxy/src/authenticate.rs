//! Peer to Caller: from whom a request is. The peer proved itself by its certificate; its sidecar may show an access token beside
//! it, which is taken out of the request here, verified, and held against the certificate of this very connection.

use std::{cell::OnceCell, rc::Rc, sync::Arc};

use countersign_core::{
    signal::statement::Subject,
    token::{self, AccessToken, Authorities, ShownToken, TokenFault, TokenId},
};
use http::{HeaderMap, HeaderValue};

use crate::{
    answer::Refusal, families::Newest, hygiene, identify::Peer, live::Exchange, shared::Shared, view::Compiled,
    workers::Worker,
};

/// Made only by [`authenticate`], from a verified peer.
pub(crate) struct Caller(Rc<Peer>);

/// What came as an access token. Nothing in it is true yet.
pub(crate) enum PresentedToken {
    Nothing,
    One(HeaderValue),
    Several,
}

/// The access token of one exchange.
pub(crate) struct Token {
    shown: ShownToken,
    held: Option<Rc<AccessToken>>,
    family: Option<Subject>,       // what signals say of it is said of who shows it
    revoked: OnceCell<ShownToken>, // what it is seen as since it was revoked
}

/// Why a token is not believed, and its id when it is known.
type NotBelieved = (TokenFault, Option<TokenId>);

/// A token that was verified on a connection, so that the next request with the same one costs a comparison.
pub(crate) struct Known {
    value: HeaderValue,
    authorities: Arc<Authorities>,
    token: Rc<AccessToken>,
    family: Arc<Newest>,
}

impl PresentedToken {
    /// Takes it out of the headers, where nobody finds it after this.
    pub(crate) fn take(headers: &mut HeaderMap) -> Self {
        let mut values = headers.get_all(hygiene::TOKEN).iter();
        match (values.next().cloned(), values.next().is_some()) {
            (None, _) => Self::Nothing,
            (Some(_), true) => {
                headers.remove(hygiene::TOKEN);
                Self::Several
            }
            (Some(one), false) => {
                headers.remove(hygiene::TOKEN);
                Self::One(one)
            }
        }
    }
}

/// Says from whom a request is. A peer whose SVID was revoked since its handshake is nobody. A token that is not believed is not an
/// error: the law denies what comes with it, and the record says why.
pub(crate) fn authenticate(
    worker: &Worker,
    exchange: &Exchange,
    view: &Compiled,
    presented: PresentedToken,
) -> Result<Caller, Refusal> {
    let peer = &exchange.peer;
    if peer.proof().is_revoked(&worker.shared) {
        return Err(Refusal::Unproven);
    }
    let token = match presented {
        PresentedToken::Nothing => None,
        PresentedToken::Several => Some(Token::refused(ShownToken::refused(TokenFault::Malformed, None))),
        PresentedToken::One(value) => Some(Token::read(worker, peer, view, value)),
    };
    if let Some(token) = token {
        exchange.show_token(token);
    }
    Ok(Caller(peer.clone()))
}

impl Caller {
    pub(crate) fn peer(&self) -> &Rc<Peer> {
        &self.0
    }
}

impl Token {
    fn refused(shown: ShownToken) -> Self {
        Self { shown, held: None, family: None, revoked: OnceCell::new() }
    }

    /// INVARIANT (token-of-this-connection): a token is believed only of the workload and the certificate that this connection was
    /// opened with.
    fn read(worker: &Worker, peer: &Peer, view: &Compiled, value: HeaderValue) -> Self {
        let now_seconds = (worker.now_ms() / 1000) as i64;
        let (token, family) = match peer.verified_token(worker, view, value, now_seconds) {
            Ok(verified) => verified,
            Err((fault, id)) => return Self::refused(ShownToken::refused(fault, id)),
        };
        let is_revoked = worker.shared.signals().is_token_revoked(token.claims());
        let fault = token
            .fault_of(peer.id(), &peer.proof().certificate(), now_seconds)
            .or(is_revoked.then_some(TokenFault::Revoked))
            .or_else(|| family.has_superseded(token.claims()).then_some(TokenFault::Superseded));
        let family = Some(Subject::Family(token.claims().family));
        Self { shown: token.shown(fault), held: Some(token), family, revoked: OnceCell::new() }
    }

    /// As policies and records see it.
    pub(crate) fn shown(&self) -> &ShownToken {
        self.revoked.get().unwrap_or(&self.shown)
    }

    /// What signals say something of, if they do of its family.
    pub(crate) fn family(&self) -> Option<&Subject> {
        self.family.as_ref()
    }

    /// Whether it has been revoked since it came: from now on it is seen so.
    pub(crate) fn is_lost(&self, shared: &Shared) -> bool {
        let Some(token) = self.held.as_ref().filter(|_| self.shown().fault.is_none()) else { return false };
        let is_revoked = shared.signals().is_token_revoked(token.claims());
        if is_revoked {
            self.revoked.get_or_init(|| token.shown(Some(TokenFault::Revoked)));
        }
        is_revoked
    }
}

impl Peer {
    fn verified_token(
        &self,
        worker: &Worker,
        view: &Compiled,
        value: HeaderValue,
        now_seconds: i64,
    ) -> Result<(Rc<AccessToken>, Arc<Newest>), NotBelieved> {
        let authorities = worker.shared.token_authorities();
        let mut known = self.known_token.borrow_mut();
        if let Some(known) = &*known
            && Arc::ptr_eq(&known.authorities, &authorities)
            && known.value == value
        {
            return Ok((known.token.clone(), known.family.clone()));
        }
        let text = value.to_str().map_err(|_| (TokenFault::Malformed, None))?;
        let audience = view.view.trust_domain.workload(&view.view.service);
        let token = Rc::new(token::verify(text, &authorities, &audience, now_seconds)?);
        let family = worker.shared.families.of(token.claims());
        *known = Some(Known { value, authorities, token: token.clone(), family: family.clone() });
        Ok((token, family))
    }
}
