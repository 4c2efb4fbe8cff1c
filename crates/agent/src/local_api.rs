//! Commands and the agent on one machine: JSON over the unix socket `agent.sock`, for the agent's own uid only. Shows
//! what runs here; changes nothing.

use std::{io, os::unix::fs::PermissionsExt, path::Path, sync::Arc};

use axum::{
    Json, Router,
    extract::{
        Request, State,
        connect_info::{ConnectInfo, Connected},
    },
    http::StatusCode,
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
    serve::IncomingStream,
};
use countersign_api::{
    local::{Problem, ProcessView, WorkloadView},
    run_file::AGENT_SOCKET,
};
use tokio::net::UnixListener;

use crate::{workload_api::registered::Registered, workloads::Workloads};

/// Who opened a connection, as the kernel says.
#[derive(Debug, Clone, Copy)]
struct Peer {
    uid: Option<u32>,
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self { uid: stream.io().peer_cred().ok().map(|credentials| credentials.uid()) }
    }
}

/// Makes `agent.sock` below `data_dir`. It appears under its name only when no one else can open it any more.
pub(crate) fn bind(data_dir: &Path, dir: &Path) -> io::Result<UnixListener> {
    let path = data_dir.join(AGENT_SOCKET);
    if std::os::unix::net::UnixStream::connect(&path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another agent answers there"));
    }
    let new = dir.join("s");
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&new)?;
    std::fs::set_permissions(&new, PermissionsExt::from_mode(0o600))?;
    std::fs::rename(&new, &path)?;
    Ok(listener)
}

/// Answers until dropped.
pub(crate) async fn serve(listener: UnixListener, workloads: Arc<Workloads>, registered: Arc<Registered>) {
    let routes = Router::new()
        .route("/v1/workloads", get(show_workloads))
        .with_state(workloads)
        .route("/v1/processes", get(show_processes))
        .with_state(registered)
        .layer(middleware::from_fn(only_own_uid))
        .into_make_service_with_connect_info::<Peer>();
    if let Err(error) = axum::serve(listener, routes).await {
        tracing::error!(%error, "the agent's local socket failed");
    }
}

async fn show_workloads(State(workloads): State<Arc<Workloads>>) -> Json<Vec<WorkloadView>> {
    Json(workloads.views())
}

async fn show_processes(State(registered): State<Arc<Registered>>) -> Json<Vec<ProcessView>> {
    Json(registered.views())
}

/// The mode of the socket says it already; root, and whoever was handed an open connection, hear it from here.
async fn only_own_uid(ConnectInfo(peer): ConnectInfo<Peer>, request: Request, next: Next) -> Response {
    if peer.uid == Some(rustix::process::getuid().as_raw()) {
        return next.run(request).await;
    }
    let problem = Problem {
        title: "this socket is for the user that runs the agent".into(),
        status: StatusCode::FORBIDDEN.as_u16(),
        detail: None,
        help: Some("run the command as that user".into()),
        refusal: None,
    };
    let content_type = [(axum::http::header::CONTENT_TYPE, "application/problem+json")];
    (StatusCode::FORBIDDEN, content_type, Json(problem)).into_response()
}
