//! The client's end of a tunnel that connections of the pod share.

use std::{net::SocketAddr, sync::Arc};

use tokio::time::sleep;

use super::{PodProxy, outbound::Mesh, peer::Failed};
use crate::{
    identity::Svid,
    stats::Direction,
    tls::{Stream, is_shared, is_worn},
    tunnel::{
        Shared,
        pool::{Key, Proof, Tunnel},
        shared::{Commands, Event},
        sharing::Made,
    },
};

/// Makes the tunnel and keeps it, in a task of the pod, for as long as it is of use.
pub(super) fn spawn(
    mesh: &Mesh<'_>,
    svid: Arc<Svid>,
    (key, proof): (Key, Proof),
    commands: Commands,
    made: Made,
) {
    let (pod, client, address) = (Arc::clone(mesh.pod), mesh.client, mesh.address);
    let (own, server) = (Arc::clone(mesh.own), Arc::clone(mesh.server));
    mesh.pod.tasks.spawn(async move {
        let handshake = async {
            let mesh = Mesh { pod: &pod, client, address, own: &own, server: &server };
            mesh.handshake(&svid, key, proof, &svid.sharing_client).await
        };
        let kept = async {
            // Apart: its state is larger than all that the tunnel needs afterwards.
            let tunnel = Box::pin(handshake).await;
            keep(&pod, address, tunnel, commands, made).await;
        };
        tokio::select! {
            biased;
            () = pod.kill.cancelled() => {}
            () = kept => {}
        }
    });
}

async fn keep(
    pod: &PodProxy,
    address: SocketAddr,
    tunnel: Result<Tunnel<Stream>, Failed>,
    mut commands: Commands,
    made: Made,
) {
    let tunnel = match tunnel {
        Ok(tunnel) => tunnel,
        Err(failed) => {
            pod.no_tunnel(Direction::Outbound, address, &failed);
            return commands.reject(&failed.to_string());
        }
    };
    if !is_shared(&tunnel.stream) {
        made.unshared();
        pod.pool.put(tunnel);
        return commands.reject("the other agent knows no shared tunnels");
    }
    made.established(tunnel.not_after);
    let mut shared = Shared::client(tunnel.stream, commands, pod.growth.clone());
    let mut vacant = false;
    loop {
        let idle = vacant && shared.is_idle();
        let rested = async {
            if made.is_surplus() || !pod.pool.keeps_any() {
                return;
            }
            tokio::select! {
                () = sleep(pod.timeouts.idle_tunnel) => {}
                () = made.retired() => {}
                () = pod.drain.cancelled() => {}
            }
        };
        let event = tokio::select! {
            biased;
            event = shared.next() => event,
            () = made.vacated() => {
                vacant = true;
                continue;
            }
            () = rested, if idle => {
                if made.leave() {
                    return;
                }
                // A connection is about to come.
                vacant = false;
                continue;
            }
        };
        match event {
            // Its connections may still have their seats: `vacated` says when not.
            Ok(Event::Idle) => {}
            Ok(Event::GoingAway) => made.retire(),
            Ok(Event::Closed) => return,
            Ok(Event::Asked(..)) => unreachable!("a server asks for no connection"),
            Err(why) => {
                return tracing::debug!(pod = %pod.uid, %address, "a shared tunnel ended: {why}");
            }
        }
        if is_worn(shared.tunnel()) {
            made.retire();
        }
    }
}
