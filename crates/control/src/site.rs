//! The site: what browsers and distant commands see of the control plane, over HTTP or HTTPS. Pages are made here and JSON for
//! their scripts; what a request means is decided in the rooms that it is passed to, and no rule is enforced in a browser.
//!
//! | furniture | holds |
//! |---|---|
//! | [`place`] | where it listens, and under which origin browsers know it |
//! | [`serve`] | connections: TLS, limits, time |
//! | [`guard`] | what every request passes before anything else looks at it |
//! | [`session`] | who is signed in |
//! | [`sign_in`] | how operators came to be |
//! | [`logout`] | how a provider says that they are it no more |
//! | [`provider`] | how somebody came to be whom a provider vouches for |
//! | [`device`] | how a command on another machine comes to be |
//! | [`command`] | what it may ask |
//! | [`enroll`] | how somebody becomes an operator, and gets one more factor |
//! | [`ceremony`] | how an operator signs a change, or answers for somebody else's |
//! | [`pages`] | the pages, and what is around each |
//! | [`overview`] | what the mesh is, and what runs |
//! | [`changes`] | what waits, and what it would change |
//! | [`entries`] | the ledger, with proofs |
//! | [`decisions`] | decisions about requests |
//! | [`acts`] | where a factor is shown to read what is sensitive |
//! | [`people`] | operators, factors, sessions |
//! | [`live`] | news for pages that are open |
//! | [`standing`] | whose signatures count, entry by entry |
//! | [`words`] | how times, states and changes are said |
//! | [`assets`] | files that pages load |

use std::sync::Arc;

use axum::{
    Router,
    extract::DefaultBodyLimit,
    middleware,
    routing::{get, post},
};

use countersign_api::device::{AUTHORIZE_PATH, PAGE_PATH, TOKEN_PATH};

use crate::Plane;

pub mod acts;
pub mod assets;
pub mod ceremony;
pub mod changes;
pub mod command;
pub mod decisions;
pub mod device;
pub mod enroll;
pub mod entries;
pub mod guard;
pub mod live;
pub mod logout;
pub mod overview;
pub mod pages;
pub mod people;
pub mod place;
pub mod provider;
pub mod serve;
pub mod session;
pub mod sign_in;
pub mod standing;
#[cfg(test)]
mod tests;
pub mod tokens;
pub mod words;

pub use place::{Site, SiteConfig, SiteError};

/// Longest body of a request of a browser, in bytes: an authenticator's answer with an attestation.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// Everything that is served.
pub fn router(plane: Arc<Plane>) -> Router {
    let strangers = Router::new()
        .route("/sign-in/key/begin", post(sign_in::begin_key))
        .route("/sign-in/key/finish", post(sign_in::finish_key))
        .route("/sign-in/code", post(sign_in::code))
        .route("/sign-in/with/{name}", get(provider::ask))
        .route("/sign-in/with/{name}/answer", get(provider::answer))
        .route("/enroll/key/begin", post(enroll::begin_key))
        .route("/enroll/key/finish", post(enroll::finish_key))
        .route("/enroll/code/begin", post(enroll::begin_code))
        .route("/enroll/code/finish", post(enroll::finish_code))
        .route(AUTHORIZE_PATH, post(device::authorize))
        .route(TOKEN_PATH, post(device::token))
        .route_layer(middleware::from_fn_with_state(plane.clone(), guard::slow_down_strangers));
    let operators = Router::new()
        .route("/sign-out", post(sign_in::sign_out))
        .route("/device/answer", post(device::answer))
        .route("/operators/ask", post(people::ask))
        .route("/sessions/{id}/end", post(people::end_session))
        .route("/acts/{id}/challenge", post(acts::challenge))
        .route("/acts/{id}/sign", post(acts::sign))
        .route("/acts/{id}/code", post(acts::code))
        .route("/changes/{id}/challenge", post(ceremony::challenge))
        .route("/changes/{id}/sign", post(ceremony::sign))
        .route("/changes/{id}/code", post(ceremony::code))
        .route("/changes/{id}/reject", post(ceremony::reject))
        .route("/changes/{id}/withdraw", post(ceremony::withdraw));
    Router::new()
        .merge(pages::router())
        .merge(strangers)
        .merge(operators)
        .merge(command::router(&plane))
        .route("/sign-in/with/{name}/logout", post(logout::logout))
        .route(PAGE_PATH, get(device::device))
        .route("/assets/{name}", get(assets::asset))
        .fallback(pages::not_found)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn_with_state(plane.clone(), guard::guard))
        .with_state(plane)
}
