//! `authority show`: the roots that verify every identity of the mesh, what signs them now, and the key of its ledger.

use countersign_api::local::{AuthorityView, CertificateView};

use crate::{
    client::Client,
    error::Done,
    mesh_finder::Place,
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
