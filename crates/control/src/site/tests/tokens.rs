//! The page of access tokens.

use countersign_core::signal::TokensMeant;

use super::*;
use crate::{store::StoredToken, tokens};

#[tokio::test]
async fn tokens_are_shown_to_who_shows_a_key_for_them_with_who_took_which_back_and_why() {
    let mesh = Mesh::start().await;
    let mut alice = mesh.owner("alice").await;
    let now_ms = mesh.plane().clock.now_ms();
    let stored = |instance: &str, random: u8| {
        let (subject, id) = (instance.split('/').next().unwrap(), tokens_id(now_ms, random));
        let of = |path: &str| format!("spiffe://shop.example/{path}");
        let claims = serde_json::from_value(json!({
            "iss": "https://shop.example", "sub": of(subject), "aud": of("catalog"), "client_id": of(subject), "iat": now_ms / 1000,
            "exp": now_ms / 1000 + 300, "jti": id, "scope": "http:GET", "instance": instance, "family": id,
            "cnf": { "x5t#S256": BASE64URL.encode([1; 32]) },
        }));
        StoredToken { claims: claims.unwrap(), host: Some(ServiceName::parse("h1").unwrap()) }
    };
    let all = [stored("web/1", 1), stored("cron/1", 2)];
    let put = move |store: &mut dyn crate::store::Store| store.put_tokens(&all, now_ms);
    mesh.plane().storage.run("put_tokens", put).await.unwrap();
    let family = TokensMeant::Family(tokens_id(now_ms, 2).parse().unwrap());
    let reason = "shown by spiffe://shop.example/<b>: another_key".to_owned();
    tokens::put_revocation(mesh.plane(), family, "countersign".to_owned(), reason).await.unwrap();

    let (status, page) = alice.get("/tokens").await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert!(!page.contains("web/1") && !page.contains("another_key"), "{page}");
    alice.opens("read_tokens").await.unwrap();
    let (status, page) = alice.get("/tokens").await;
    assert_eq!(status, StatusCode::OK, "{page}");
    assert!(page.contains("web/1") && !page.contains("cron/1"), "what was taken back is good no more: {page}");
    assert!(page.contains("another_key") && page.contains("family:") && !page.contains("<b>"), "{page}");
    let (_, page) = alice.get("/tokens?service=&subject=cron").await;
    assert!(!page.contains("web/1") && page.contains("None: no service demands them"), "{page}");
    let (status, page) = alice.get("/tokens?service=Not%20One").await;
    assert!(status.is_success() && page.contains("role=\"alert\""), "{page}");
}

fn tokens_id(now_ms: u64, random: u8) -> String {
    countersign_core::token::TokenId::new(now_ms, [random; 10]).to_string()
}
