//! What the audit trail says of operators in browsers, and what it never says.

use super::*;
use crate::AUDIT_FILE;

#[tokio::test]
async fn the_trail_says_who_signed_in_read_and_was_refused_and_holds_no_secret() {
    let mesh = Mesh::start().await;
    let link = mesh.link().await;
    let mut alice = mesh.browser();
    let enrolled = alice.enrols("alice", Some(&link)).await.unwrap();
    alice.signs_in(json!({})).await.unwrap();
    let mut stranger = mesh.browser();
    let guess = "Zq7Zq7";
    for operator in ["alice", "zoe"] {
        let guessed = json!({ "operator": operator, "code": guess });
        assert_eq!(stranger.post("/sign-in/code", guessed).await.unwrap_err().0, 403);
    }
    assert_eq!(stranger.signs_in(json!({})).await.unwrap_err().0, 403);
    assert_eq!(alice.get("/decisions").await.0, StatusCode::FORBIDDEN);
    alice.opens("read_decisions").await.unwrap();
    assert_eq!(alice.get("/decisions").await.0, StatusCode::OK);
    let invite = Change::InviteOperator { name: OperatorName::parse("bob").unwrap(), roles: ["owner".into()].into() };
    let id = propose(&mesh, invite).await;
    let token = alice.signs_change(&id, &mesh.origin()).await.unwrap()["invitations"][0]["token"].clone();
    let (cookie, csrf) = (alice.cookie.clone().unwrap(), alice.csrf.clone());
    alice.post("/sign-out", json!({})).await.unwrap();

    let trail = mesh.dir.path().join(AUDIT_FILE);
    let Mesh { control, dir: _dir, .. } = mesh;
    control.stop().await;
    let text = std::fs::read_to_string(trail).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let said: Vec<_> = lines
        .iter()
        .map(|line| {
            let who = [&line["user"]["name"], &line["actor"]["user"]["name"]].map(|name| name.as_str().unwrap_or("-"));
            format!("{}: {} {} {}", line["message"].as_str().unwrap(), who[0], who[1], line["status"].as_str().unwrap())
        })
        .collect();
    let expected = [
        "the control plane started: - - Success",
        "a change was applied: - local Success",
        "a change was applied: - local Success",
        "an operator was invited: alice local Success",
        "an operator enrolled a factor: alice local Success",
        "an operator enrolled a factor: alice local Success",
        "an operator signed in: alice - Success",
        "what an operator showed was refused: alice - Failure",
        "a signal was sent: - countersign/factor-refused Success",
        "a sign-in was refused: alice - Failure",
        "a sign-in was refused: zoe - Failure",
        "a sign-in was refused: unknown - Failure",
        "an act was not let pass: - alice Failure",
        "an act passed the gate: - alice Success",
        "a change was applied: - alice Success",
        "an operator was invited: bob alice Success",
        "a session was ended: alice alice Success",
        "the control plane stopped: - - Success",
    ];
    assert_eq!(said, expected, "{said:#?}");
    let codes = enrolled["recovery_codes"].as_array().unwrap().iter().map(|code| code.as_str().unwrap());
    let cookie = cookie.split_once('=').unwrap().1;
    for secret in codes.chain([cookie, &csrf, &link, token.as_str().unwrap(), guess]) {
        assert!(!text.contains(secret), "{secret}");
    }
}
