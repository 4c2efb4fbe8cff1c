//! What a token is good for now (RFC 7662), and taking it back (RFC 7009). Both are for whom it concerns: the client that holds it, and, to
//! look, the service that it is for. To anybody else there is no such token.

use serde_json::{Value, json};

use countersign_core::{signal::TokensMeant, token::Claims};

use super::{Refused, Service, client::Client, form::Form, grant::token_type};
use crate::tokens::put_revocation;

/// What the token says, if it is good now.
pub fn introspect(service: &Service, client: &Client, form: &Form) -> Result<Value, Refused> {
    let concerns = |claims: &Claims| claims.audience == client.id || claims.client_id == client.id;
    let Some(claims) = service.read(form.demand("token")?).filter(concerns) else {
        // "the introspection response … SHOULD NOT include any additional information" (RFC 7662, 2.2).
        return Ok(json!({ "active": false }));
    };
    let mut said = serde_json::to_value(&claims).expect("INVARIANT: claims are plain JSON");
    said["active"] = true.into();
    said["token_type"] = token_type(&claims.confirmation).into();
    Ok(said)
}

/// Makes the token good for nothing, everywhere, if it is the client's own. One that is not is answered like one that is none.
pub async fn revoke(service: &Service, client: &Client, form: &Form) -> Result<(), Refused> {
    let token = form.demand("token")?;
    let Some(claims) = service.read(token).filter(|claims| claims.client_id == client.id) else { return Ok(()) };
    service.oauth.count(&client.id)?;
    // With it goes what it was exchanged for; not what it was given in exchange for, which is somebody else's.
    let meant = match claims.id == claims.family {
        true => TokensMeant::Family(claims.family),
        false => TokensMeant::Id(claims.id),
    };
    put_revocation(&service.plane, meant, client.id.to_string(), "its client took it back".to_owned()).await?;
    Ok(())
}
