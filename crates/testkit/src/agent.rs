//! The agent's end of a sidecar's socket pair, in the hands of a test.

use std::{os::unix::net::UnixStream, time::Duration};

use countersign_api::{
    mesh::InstanceRevision,
    sidecar::{
        AgentFrames, Configure, Listening, SidecarMessage, SidecarOrder, sidecar_message::Message, sidecar_order::Order,
    },
};
use countersign_core::view::View;
use futures_util::{SinkExt, StreamExt};
use tokio::time::timeout;
use tokio_util::codec::Framed;

/// Longest wait for a message.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// An agent that does what the test says.
pub struct ScriptedAgent {
    frames: Framed<tokio::net::UnixStream, AgentFrames>,
}

impl ScriptedAgent {
    /// The agent, and the end for a sidecar.
    pub fn pair() -> (Self, UnixStream) {
        let (agent, sidecar) = UnixStream::pair().unwrap();
        agent.set_nonblocking(true).unwrap();
        let frames = Framed::new(tokio::net::UnixStream::from_std(agent).unwrap(), AgentFrames::default());
        (Self { frames }, sidecar)
    }

    /// Gives an order.
    pub async fn order(&mut self, order: Order) {
        self.frames.send(SidecarOrder { order: Some(order) }).await.unwrap();
    }

    /// Configures the sidecar and returns where it listens.
    pub async fn configure(&mut self, configure: Configure) -> Listening {
        self.order(Order::Configure(configure)).await;
        match self.next().await {
            Message::Listening(listening) => listening,
            other => panic!("instead of where it listens: {other:?}"),
        }
    }

    /// Offers a view.
    pub async fn offer(&mut self, view: &View) {
        self.order(Order::ViewJson(serde_json::to_vec(view).unwrap().into())).await;
    }

    /// The next message.
    pub async fn next(&mut self) -> Message {
        let next = timeout(ANSWER_WITHIN, self.frames.next()).await.expect("the sidecar says nothing");
        let SidecarMessage { message } = next.expect("the sidecar is gone").unwrap();
        message.expect("a message of this version")
    }

    /// The next message that `wanted` picks; others are passed over.
    pub async fn until<T>(&mut self, mut wanted: impl FnMut(Message) -> Option<T>) -> T {
        loop {
            if let Some(found) = wanted(self.next().await) {
                return found;
            }
        }
    }

    /// The next acknowledgement.
    pub async fn applied(&mut self) -> InstanceRevision {
        self.until(|message| match message {
            Message::Applied(applied) => Some(applied),
            _ => None,
        })
        .await
    }
}
