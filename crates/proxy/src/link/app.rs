//! Whether the workload accepts connections: asked often until it does, then only when the path could not reach it. A
//! probe is a connection that is closed at once; a workload that is up sees none.

use std::{io, sync::Arc, time::Duration};

use countersign_api::sidecar::{SidecarMessage, sidecar_message};
use tokio::{
    net::TcpSocket,
    sync::mpsc,
    time::{sleep, timeout},
};
use tracing::info;

use super::message;
use crate::shared::{App, Shared};

const PROBE_EVERY: Duration = Duration::from_millis(50);
const CONNECT_WITHIN: Duration = Duration::from_secs(1);

/// Says each time that the workload began, or ceased, to accept connections.
pub(super) async fn watch(shared: Arc<Shared>, say: mpsc::Sender<SidecarMessage>) {
    let Some(app) = &shared.setup.app else { return };
    let mut was_ready = false;
    loop {
        let is_ready = accepts(app).await;
        if is_ready != was_ready {
            shared.set_app_ready(is_ready);
            info!(ready = is_ready, "workload readiness");
            if say.send(message(sidecar_message::Message::AppReady(is_ready))).await.is_err() {
                return;
            }
        }
        was_ready = is_ready;
        if is_ready { shared.app_doubted().await } else { sleep(PROBE_EVERY).await }
    }
}

async fn accepts(app: &App) -> bool {
    let connect = async {
        let socket = (app.socket)()?;
        socket.set_nonblocking(true)?;
        TcpSocket::from_std_stream(socket.into()).connect(app.address).await?;
        io::Result::Ok(())
    };
    matches!(timeout(CONNECT_WITHIN, connect).await, Ok(Ok(())))
}
