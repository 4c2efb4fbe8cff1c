//! `authority show`: the roots that verify every identity of the mesh, what signs them now, and the key of its ledger.
//! `authority rotate`: another key that seals them.

use countersign_api::local::{AuthorityView, CertificateView, KeyPlace, Rotate, Rotated};

use crate::{
    client::Client,
    error::Done,
    mesh_finder::Place,
    operator::Who,
    render::{self, Output, cell},
};

/// Shows the trust bundle.
pub async fn show(place: &Place, output: Output) -> Done {
    let authority: AuthorityView = Client::control(place).get("/v1/authority").await?;
    let now_ms = render::now_ms();
    render::answer(output, &authority, |authority, paint| {
        let row = |role: &str, certificate: &CertificateView| {
            vec![
                cell(role),
                cell(&certificate.subject),
                cell(render::distance(certificate.not_after_ms, now_ms)),
                cell(certificate.sha256),
            ]
        };
        let mut rows: Vec<_> = authority.roots.iter().map(|root| row("root", root)).collect();
        rows.push(row("issuing", &authority.issuing));
        format!(
            "{} {}\n{} {}s\n{} {}\n{} {}\n{} {}\n\n{}\n{}",
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
            render::table(&["ROLE", "SUBJECT", "EXPIRES", "SHA-256"], rows, paint),
            authority.bundle_pem,
        )
    })
}

/// Seals every key with the one at `next`.
pub async fn rotate(place: &Place, next: KeyPlace, who: &Who, output: Output) -> Done {
    let asked = Rotate { next, shown: who.shown() };
    let rotated: Rotated = Client::control(place).post("/v1/authority/rotate", &asked).await?;
    render::answer(output, &rotated, |rotated, paint| {
        let by = rotated.revision.map_or_else(String::new, |revision| format!(", chosen by revision {revision}"));
        format!(
            "{} {} secrets with key {}{by}\n{} {}\n{} the old key opens nothing that is kept now; copies made before it still open with it\n",
            paint.good("sealed anew:"),
            rotated.resealed,
            rotated.fingerprint.short(),
            paint.note("from now on start with:"),
            rotated.place.flag(),
            paint.warn("note:"),
        )
    })
}
