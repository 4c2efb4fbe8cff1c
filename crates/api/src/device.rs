//! How an operator signs a command in from another machine: OAuth 2.0 device authorization (RFC 8628). The command asks, shows a
//! short code, and asks again until somebody who is signed in to the dashboard has said yes or no there. What it gets is bound to
//! its key ([`crate::dpop`]).
//!
//! | request | form | answer |
//! |---|---|---|
//! | `POST /device/authorize` | `client_id`, `dpop_jkt`, `device_name` | [`Authorization`] |
//! | `POST /device/token`, with a proof | `grant_type`, `client_id`, `device_code` | [`Granted`], or 400 with an [`OAuthError`] |
//! | `GET /v1/session`, with the token | | [`SessionView`](crate::local::SessionView): who that is |
//! | `POST /v1/session/end`, with the token | | [`SessionsEnded`](crate::local::SessionsEnded) |
//!
//! Beside these, a command that is signed in asks what [`crate::local`] answers.

use serde::{Deserialize, Serialize};

/// Where a command asks.
pub const AUTHORIZE_PATH: &str = "/device/authorize";
/// Where it asks whether somebody has answered.
pub const TOKEN_PATH: &str = "/device/token";
/// The page on which somebody answers.
pub const PAGE_PATH: &str = "/device";
/// The name of the only client that there is: this command.
pub const CLIENT_ID: &str = "countersign";
/// What a command trades for a token.
pub const GRANT_TYPE: &str = "urn:ietf:params:oauth:grant-type:device_code";

/// What a command is to show, and what to ask with (RFC 8628, 3.2).
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authorization {
    /// What it asks with. Nobody else learns it.
    pub device_code: String,
    /// What it shows.
    pub user_code: String,
    /// Where somebody types that.
    pub verification_uri: String,
    /// The same, typed already.
    pub verification_uri_complete: String,
    /// How long both are good, in seconds.
    pub expires_in: u64,
    /// How many seconds lie between two questions at least.
    pub interval: u64,
}

/// A token that is good with the key it is bound to.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Granted {
    /// The token.
    pub access_token: String,
    /// `DPoP`.
    pub token_type: String,
    /// How long it lasts at most, in seconds.
    pub expires_in: u64,
    /// Who is signed in, named as in [`SessionView::who`](crate::local::SessionView::who).
    pub who: String,
}

/// Why there is no token (RFC 6749, 5.2).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OAuthError {
    /// In one word.
    pub error: String,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_description: Option<String>,
}
