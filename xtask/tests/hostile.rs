//! A hostile peer faces a real agent: wrong certificates, wrong frames, no handshake at all, and
//! a server that is somebody else, or only old.

#[path = "support/peer.rs"]
mod peer;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_common::svid::PeerVerifier;
use peer::{ALPN, Ca, Claim, Client, converse, data, dial, frame, open, uri, workload};
use rcgen::SanType;
use rustls::sign::CertifiedKey;
use xtask::lab::control::TRUST_DOMAIN;
use xtask::lab::mesh::{Settings, counted};
use xtask::lab::tls::{Hello, TLS13, inspect};
use xtask::lab::traffic::{exchange, expect_refusal};
use xtask::lab::{Canary, Load, Mesh, Pod, Server, patience, span, until};

const PORT: u16 = 8080;
const OTHER_PORT: u16 = 8081;

/// A mesh with an enrolled server, and a pod that is registered but not captured, so that it can
/// say what it likes.
struct Scene {
    mesh: Mesh,
    server: Pod,
    attacker: Pod,
    ca: Ca,
    verifier: Arc<PeerVerifier>,
}

impl Scene {
    fn new(title: &str, agent: &str) -> Result<Self> {
        let mut mesh = Mesh::with(title, 2, Settings { agent, ..Settings::default() })?;
        let server = mesh.pod(1, "server")?;
        let attacker = mesh.plain_pod(0, "attacker")?;
        mesh.control.register(&attacker)?;
        mesh.wait_synced()?;
        let ca = Ca::of(&mesh.control)?;
        let verifier = peer::verifier(&mesh.control)?;
        Ok(Self { mesh, server, attacker, ca, verifier })
    }

    /// What the control plane would issue to the attacker.
    fn rightful(&self) -> Result<Arc<CertifiedKey>> {
        self.ca.issue(&Claim::of(&self.attacker)?)
    }

    /// How often the server's agent has refused somebody for this reason.
    fn refused(&self, why: Refusal) -> Result<u64> {
        let (list, key, value) = match why {
            Refusal::Handshake(result) => ("handshakes", "result", result),
            Refusal::Denied(reason) => ("denied", "reason", reason),
        };
        Ok(counted(&self.mesh.agents[1].status()?, list, key, value))
    }

    /// A tunnel of the attacker with nothing wrong about it yet.
    fn tunnel(&self, family: usize) -> Result<(Client, SocketAddr)> {
        let identity = Some(self.rightful()?);
        let to = self.server.sockets(PORT)[family];
        let client = dial(&self.attacker, to, &self.verifier, identity, ALPN)?;
        let source = client.sock.local_addr()?;
        Ok((client, source))
    }
}

/// What the agent calls it when it refuses a peer.
#[derive(Clone, Copy)]
enum Refusal {
    Handshake(&'static str),
    Denied(&'static str),
}

/// An echo server that tells of every connection once it has ended: what came, and how it ended.
struct Application {
    ended: mpsc::Receiver<(Vec<u8>, Option<ErrorKind>)>,
    _server: Server,
}

impl Application {
    fn start(pod: &Pod, port: u16) -> Result<Self> {
        let (sender, ended) = mpsc::channel();
        let server = pod.serve(port, move |mut stream| {
            let mut heard = Vec::new();
            let mut buffer = [0; 4096];
            let end = loop {
                match stream.read(&mut buffer) {
                    Ok(0) => break None,
                    Ok(count) => {
                        heard.extend(&buffer[..count]);
                        // A client that is gone is seen by the next read.
                        stream.write_all(&buffer[..count]).ok();
                    }
                    Err(error) => break Some(error.kind()),
                }
            };
            // Nobody listens any more when the test has ended.
            sender.send((heard, end)).ok();
        })?;
        Ok(Self { ended, _server: server })
    }

    /// The next connection that has ended is this one.
    fn expect(&self, heard: &[u8], end: Option<ErrorKind>) -> Result<()> {
        let next = self.ended.recv_timeout(patience()).context("no connection has ended")?;
        ensure!(next == (heard.to_vec(), end), "the application saw {next:02x?}");
        Ok(())
    }
}

/// Each attempt is refused for its own reason, and the same with the truth instead is served.
#[test]
fn wrong_certificates_are_refused() -> Result<()> {
    let scene = Scene::new("wrong_certificates_are_refused", "")?;
    let application = Application::start(&scene.server, PORT)?;
    let stranger = Ca::stranger()?;
    let name = || workload(TRUST_DOMAIN, "attacker");
    let right = || Claim::of(&scene.attacker);
    let lie = |change: &dyn Fn(&mut Claim)| -> Result<_> {
        let mut claim = right()?;
        change(&mut claim);
        scene.ca.issue(&claim)
    };
    let named = |names: Vec<SanType>| lie(&|claim| claim.names.clone_from(&names));
    let certificate = Refusal::Handshake("certificate");
    let mismatch = Refusal::Denied("identity-mismatch");
    let node = format!("spiffe://{TRUST_DOMAIN}/nodemesh/node/a");
    let dns = || Ok::<_, anyhow::Error>(SanType::DnsName("attacker.lab.test".try_into()?));
    let lies = [
        ("expired", certificate, lie(&|claim| claim.valid = -120..-1)?),
        ("not yet valid", certificate, lie(&|claim| claim.valid = 3600..7200)?),
        ("of another root", certificate, stranger.issue(&right()?)?),
        ("of another trust domain", certificate, named(vec![uri(&workload("evil", "attacker"))?])?),
        ("with two names", certificate, named(vec![uri(&name())?, uri(&name())?])?),
        ("with a DNS name", certificate, named(vec![dns()?])?),
        ("with a DNS name too", certificate, named(vec![uri(&name())?, dns()?])?),
        ("without a name", certificate, named(vec![])?),
        ("with no name of the mesh", certificate, named(vec![uri("spiffe://lab.test/attacker")?])?),
        ("without a pod", certificate, lie(&|claim| claim.pod = None)?),
        ("of a node, as a pod's", certificate, named(vec![uri(&node)?])?),
        ("of a node", certificate, {
            let names = vec![uri(&node)?];
            scene.ca.issue(&Claim { names, pod: None, ..right()? })?
        }),
        ("of another account", mismatch, named(vec![uri(&workload(TRUST_DOMAIN, "server"))?])?),
        ("of a pod that is nowhere", Refusal::Denied("unregistered-peer"), {
            lie(&|claim| claim.pod.iter_mut().for_each(|pod| pod.uid = "uid-x".to_owned()))?
        }),
        ("of another pod", mismatch, {
            let server = Claim::of(&scene.server)?.pod;
            lie(&|claim| claim.pod.clone_from(&server))?
        }),
        ("of the server itself", Refusal::Denied("source-address"), {
            scene.ca.issue(&Claim::of(&scene.server)?)?
        }),
    ];
    for family in [0, 1] {
        let attempt = |identity, alpn: &[u8]| -> Result<()> {
            let to = scene.server.sockets(PORT)[family];
            let mut client = dial(&scene.attacker, to, &scene.verifier, identity, alpn)?;
            let source = client.sock.local_addr()?;
            converse(&mut client, source, b"hello")
        };
        let check = |what: &str, why, identity, alpn: &[u8]| -> Result<()> {
            let before = scene.refused(why)?;
            ensure!(attempt(identity, alpn).is_err(), "{what}: served");
            let counted = until("the refusal to be counted", || {
                (scene.refused(why).ok()? > before).then_some(())
            });
            counted.with_context(|| what.to_owned())?;
            // Of the two, the application sees only this one.
            attempt(Some(scene.rightful()?), ALPN).with_context(|| format!("after {what}"))?;
            application.expect(b"hello", None).with_context(|| what.to_owned())
        };
        for (what, why, identity) in &lies {
            let what = format!("a certificate {what}");
            check(&what, *why, Some(Arc::clone(identity)), ALPN)?;
        }
        check("no certificate", certificate, None, ALPN)?;
        let protocol = Refusal::Handshake("protocol");
        for (what, alpn) in [("HTTP/2", &b"h2"[..]), ("no ALPN", b"")] {
            check(what, protocol, Some(scene.rightful()?), alpn)?;
        }
    }
    Ok(())
}

/// The certificate is right, and the one who shows it is not.
#[test]
fn stolen_certificates_are_good_at_one_address_only() -> Result<()> {
    let mut scene = Scene::new("stolen_certificates_are_good_at_one_address_only", "")?;
    let application = Application::start(&scene.server, PORT)?;
    let thieves = [scene.mesh.plain_pod(0, "registered")?, scene.mesh.plain_pod(0, "unknown")?];
    scene.mesh.control.register(&thieves[0])?;
    scene.mesh.wait_synced()?;
    let denied = Refusal::Denied("source-address");
    for family in [0, 1] {
        let to = scene.server.sockets(PORT)[family];
        let attempt = |from: &Pod, claimed: &Pod| -> Result<()> {
            let mut client = dial(from, to, &scene.verifier, Some(scene.rightful()?), ALPN)?;
            let port = client.sock.local_addr()?.port();
            converse(&mut client, claimed.sockets(port)[family], b"hello")
        };
        for claimed in [&scene.attacker, &thieves[0]] {
            let before = scene.refused(denied)?;
            ensure!(attempt(&thieves[0], claimed).is_err(), "served at another pod's address");
            ensure!(scene.refused(denied)? > before, "refused for another reason");
        }
        let before = scene.refused(denied)?;
        ensure!(attempt(&thieves[1], &scene.attacker).is_err(), "served at an unknown address");
        ensure!(scene.refused(denied)? > before, "refused for another reason");
        // Its own address, but the header names another.
        let before = scene.refused(denied)?;
        ensure!(attempt(&scene.attacker, &thieves[0]).is_err(), "served with a forged header");
        ensure!(scene.refused(denied)? > before, "refused for another reason");

        attempt(&scene.attacker, &scene.attacker)?;
        application.expect(b"hello", None)?;
    }
    Ok(())
}

/// A ClientHello that offers one version of TLS, with all that either 1.2 or 1.3 needs.
fn client_hello(version: u16) -> Vec<u8> {
    let sized = |bytes: &[u8]| {
        let length = u16::try_from(bytes.len()).expect("a hello is short").to_be_bytes();
        [&length[..], bytes].concat()
    };
    let extension = |kind: u8, body: &[u8]| [&[0, kind][..], &sized(body)].concat();
    let [major, minor] = version.to_be_bytes();
    let x25519: [u8; 32] = rand::random();
    let extensions = [
        extension(10, &sized(&[0x00, 0x1d])),
        extension(13, &sized(&[0x04, 0x03])),
        extension(16, &sized(&[&[10], ALPN].concat())),
        extension(43, &[2, major, minor]),
        extension(51, &sized(&[&[0x00, 0x1d][..], &sized(&x25519)].concat())),
    ];
    let random: [u8; 32] = rand::random();
    let suites = sized(&[0x13, 0x02, 0x13, 0x01, 0xc0, 0x2b, 0xc0, 0x2c]);
    let hello =
        [&[3, 3], &random[..], &[0], &suites, &[1, 0], &sized(&extensions.concat())].concat();
    [&[22, 3, 1][..], &sized(&[&[1, 0][..], &sized(&hello)].concat())].concat()
}

#[test]
fn tls_1_2_is_refused() -> Result<()> {
    const PROTOCOL_VERSION: u8 = 70;
    let scene = Scene::new("tls_1_2_is_refused", "")?;
    for to in scene.server.sockets(PORT) {
        let answer = |version| -> Result<Vec<u8>> {
            let mut stream = scene.attacker.connect(to)?;
            stream.write_all(&client_hello(version))?;
            let mut answer = vec![0; 5];
            stream.read_exact(&mut answer)?;
            let length = u16::from_be_bytes([answer[3], answer[4]]);
            (&stream).take(length.into()).read_to_end(&mut answer)?;
            Ok(answer)
        };
        ensure!(inspect(&answer(TLS13)?)? == Hello::Server(TLS13), "TLS 1.3 is refused");
        let refusal = answer(0x0303)?;
        ensure!(inspect(&refusal)? == Hello::Alert, "answered with {refusal:02x?}");
        ensure!(refusal.ends_with(&[2, PROTOCOL_VERSION]), "not for its version: {refusal:02x?}");
    }
    Ok(())
}

/// After a handshake with nothing wrong about it. What follows the wrong frame is never heard of,
/// and a connection beside it does not notice.
#[test]
fn wrong_frames_end_their_own_tunnel_only() -> Result<()> {
    let mut scene = Scene::new("wrong_frames_end_their_own_tunnel_only", "")?;
    let application = Application::start(&scene.server, PORT)?;
    let bystander = scene.mesh.pod(0, "bystander")?;
    let _echo = scene.server.echo(OTHER_PORT)?;
    let mut beside = bystander.connect(scene.server.sockets(OTHER_PORT)[0])?;
    let mut number = 0_u8;

    let version_2 = |mut open: Vec<u8>| {
        open[3] = 2;
        open
    };
    let address: SocketAddr = "10.77.1.2:1".parse()?;
    let mapped: SocketAddr = "[::ffff:10.77.1.2]:1".parse()?;
    let idle = [
        ("HTTP", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("garbage", vec![0xff; 64]),
        ("DATA before OPEN", data(b"too early")),
        ("FIN before OPEN", frame(4, &[])),
        ("a STATUS of the client", frame(2, &[0])),
        ("an unknown type", frame(7, &[])),
        ("an OPEN of another version", version_2(open(address))),
        ("an OPEN with a mapped address", open(mapped)),
        ("an OPEN that is too short", frame(1, &[1; 22])),
        ("an OPEN that is too long", vec![1, 0xff, 0xff]),
    ];
    let busy = [
        ("garbage", vec![0xff; 64]),
        ("a second OPEN", open(address)),
        ("a STATUS of the client", frame(2, &[0])),
        ("a GOAWAY of the client", frame(6, &[])),
        ("an unknown type", frame(7, &[])),
        ("DATA that is too long", frame(3, &[0; 16_382])[..3].to_vec()),
        ("DATA without a byte", frame(3, &[])),
        ("FIN with a body", frame(4, &[0])),
    ];
    let cases = idle.iter().map(|case| (false, case)).chain(busy.iter().map(|case| (true, case)));
    for (is_busy, (what, wrong)) in cases {
        let what = format!("{what}, {}", if is_busy { "while open" } else { "while idle" });
        let (mut client, source) = scene.tunnel(0)?;
        if is_busy {
            begin(&mut client, source).with_context(|| what.clone())?;
        }
        // The agent may be gone before all of it is there.
        client.write_all(&[wrong.clone(), open(source), data(b"poison")].concat()).ok();
        expect_closed(&mut client).with_context(|| what.clone())?;
        if is_busy {
            let end = Some(ErrorKind::ConnectionReset);
            application.expect(b"before", end).with_context(|| what.clone())?;
        }
        good_one(&scene, &application).with_context(|| format!("after {what}"))?;
        ping(&mut beside, &mut number).with_context(|| format!("beside {what}"))?;
    }

    // Cut short: an end of the tunnel is not an end of the data.
    for cut in [frame(3, b"cut off")[..2].to_vec(), Vec::new()] {
        for close_notify in [false, true] {
            let (mut client, source) = scene.tunnel(0)?;
            begin(&mut client, source)?;
            client.write_all(&cut)?;
            if close_notify {
                client.conn.send_close_notify();
                client.flush()?;
            }
            client.sock.shutdown(Shutdown::Write)?;
            application.expect(b"before", Some(ErrorKind::ConnectionReset))?;
            good_one(&scene, &application)?;
        }
    }
    let (mut client, source) = scene.tunnel(0)?;
    client.write_all(&open(source)[..10])?;
    client.sock.shutdown(Shutdown::Write)?;
    expect_closed(&mut client).context("an OPEN cut short")?;
    good_one(&scene, &application)?;
    ping(&mut beside, &mut number)
}

/// Opens a connection on a tunnel; the application has heard `before`.
fn begin(client: &mut Client, source: SocketAddr) -> Result<()> {
    client.write_all(&[open(source), data(b"before")].concat())?;
    let mut answer = [0; 4 + 9];
    client.read_exact(&mut answer)?;
    ensure!(answer[..] == [&peer::ACCEPTED[..], &data(b"before")].concat(), "{answer:02x?}");
    Ok(())
}

fn expect_closed(client: &mut Client) -> Result<()> {
    let mut rest = Vec::new();
    let end = client.read_to_end(&mut rest);
    ensure!(rest.is_empty(), "answered with {rest:02x?}");
    match end {
        Err(error) if error.kind() == ErrorKind::WouldBlock => bail!("the tunnel is still open"),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// The same path with nothing wrong; the application has seen nothing between.
fn good_one(scene: &Scene, application: &Application) -> Result<()> {
    let (mut client, source) = scene.tunnel(0)?;
    converse(&mut client, source, b"after")?;
    application.expect(b"after", None)
}

fn ping(stream: &mut TcpStream, number: &mut u8) -> Result<()> {
    *number += 1;
    stream.write_all(&[*number])?;
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    ensure!(answer == [*number], "sent {number}, got {answer:?}");
    Ok(())
}

/// A client may keep a tunnel, but not what it was made under.
#[test]
fn a_kept_tunnel_outlives_nothing_that_it_rests_on() -> Result<()> {
    let lifetime = Duration::from_secs(span(4));
    let scene = Scene::new("a_kept_tunnel_outlives_nothing_that_it_rests_on", "")?;
    let application = Application::start(&scene.server, PORT)?;
    let to = scene.server.sockets(PORT)[0];
    let born = Instant::now();
    let short =
        Claim { valid: -60..lifetime.as_secs().cast_signed(), ..Claim::of(&scene.attacker)? };
    let short = scene.ca.issue(&short)?;
    let mut expiring = dial(&scene.attacker, to, &scene.verifier, Some(short), ALPN)?;
    let (mut kept, source) = scene.tunnel(0)?;
    for _ in 0..2 {
        for client in [&mut expiring, &mut kept] {
            converse(client, source, b"while it lasts")?;
            application.expect(b"while it lasts", None)?;
        }
    }
    // Expiry is a matter of time.
    thread::sleep((lifetime + Duration::from_secs(1)).saturating_sub(born.elapsed()));
    expect_nothing_served(&mut expiring, source).context("with an expired certificate")?;
    converse(&mut kept, source, b"the other one")?;
    application.expect(b"the other one", None)?;

    scene.mesh.control.deregister(&scene.attacker)?;
    scene.mesh.wait_synced()?;
    expect_nothing_served(&mut kept, source).context("of a pod that was deregistered")?;
    scene.mesh.control.register(&scene.attacker)?;
    scene.mesh.wait_synced()?;
    good_one(&scene, &application)
}

/// Tries another connection on a tunnel; the server may refuse, or have hung up.
fn expect_nothing_served(client: &mut Client, source: SocketAddr) -> Result<()> {
    client.write_all(&[open(source), data(b"too late"), frame(5, &[])].concat()).ok();
    let mut answer = Vec::new();
    let mut buffer = [0; 512];
    // A tunnel that has refused may stay open.
    while !answer.starts_with(&[2]) && !answer.starts_with(&[6, 0, 0, 2]) {
        match client.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => answer.extend(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => bail!("no answer: {answer:?}"),
            Err(_) => return Ok(()),
        }
    }
    ensure!(!answer.windows(4).any(|bytes| bytes == peer::ACCEPTED), "served: {answer:02x?}");
    Ok(())
}

/// Who has a certificate can make tunnels in advance, and hold them no longer than idle ones.
#[test]
fn tunnels_without_a_header_are_closed() -> Result<()> {
    const GOAWAY: [u8; 3] = [6, 0, 0];
    let scene = Scene::new("tunnels_without_a_header_are_closed", "timeouts: {idle_tunnel: 1s}")?;
    let application = Application::start(&scene.server, PORT)?;
    let (silent, source) = scene.tunnel(0)?;
    let (mut slow, _) = scene.tunnel(0)?;
    slow.write_all(&open(source)[..10])?;
    for (what, mut client) in [("a silent one", silent), ("half a header", slow)] {
        let mut rest = Vec::new();
        if let Err(error) = client.read_to_end(&mut rest) {
            ensure!(error.kind() != ErrorKind::WouldBlock, "{what} is still open");
        }
        ensure!(rest.is_empty() || rest == GOAWAY, "{what} was answered {rest:02x?}");
    }
    good_one(&scene, &application)
}

/// More handshakes that never end than the agent does at a time, and every connection of the
/// client that means it needs a handshake of its own.
#[test]
fn slow_handshakes_hold_nobody_up() -> Result<()> {
    const SLOW: usize = 300;
    let timeout = span(6);
    let agent =
        format!("timeouts: {{handshake: {timeout}s}}\nlimits: {{idle_tunnels_per_peer: 0}}");
    let mut scene = Scene::new("slow_handshakes_hold_nobody_up", &agent)?;
    let client = scene.mesh.pod(0, "client")?;
    let load = Load::new(&client, &scene.server, PORT)?;
    let timeouts = Refusal::Handshake("timeout");
    load.during(|| {
        load.wait_for_successes(10)?;
        let slow = (0..SLOW)
            .map(|number| {
                let mut stream = scene.attacker.connect(scene.server.sockets(PORT)[number % 2])?;
                // The beginning of a ClientHello.
                stream.write_all(&client_hello(TLS13)[..number % 40])?;
                Ok(stream)
            })
            .collect::<Result<Vec<_>>>()?;
        load.wait_for_successes(20).context("while the slow ones hold on")?;
        ensure!(scene.refused(timeouts)? == 0, "served only when the first slow ones were gone");
        for mut stream in slow {
            // Whatever the agent had to say, it has hung up.
            match stream.read_to_end(&mut Vec::new()) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => bail!("still open"),
                Ok(_) | Err(_) => {}
            }
        }
        ensure!(scene.refused(timeouts)? >= SLOW as u64, "closed for another reason");
        load.wait_for_successes(10)
    })?;
    load.expect_no_failures()
}

/// Where the registry says that a pod is, somebody else answers. The pod's own certificate is what
/// makes the difference.
#[test]
fn servers_that_are_somebody_else_hear_nothing() -> Result<()> {
    let mut mesh = Mesh::new("servers_that_are_somebody_else_hear_nothing")?;
    let client = mesh.pod(0, "client")?;
    let (victim, other) = (mesh.plain_pod(1, "victim")?, mesh.plain_pod(1, "other")?);
    mesh.control.register(&victim)?;
    mesh.control.register(&other)?;
    mesh.wait_synced()?;
    let ca = Ca::of(&mesh.control)?;
    let verifier = peer::verifier(&mesh.control)?;
    for (who, is_victim) in [(&other, false), (&victim, true)] {
        for family in [0, 1] {
            let canary = Canary::random();
            let wire = mesh.lab.capture()?;
            let identity = ca.issue(&Claim::of(who)?)?;
            let listener = victim.listen(PORT)?;
            let verifier = Arc::clone(&verifier);
            let answering = thread::spawn(move || {
                let (stream, _) = xtask::lab::traffic::accept(&listener)?;
                peer::serve(stream, verifier, identity).context("serving")
            });
            let to = victim.sockets(PORT)[family];
            if is_victim {
                exchange(client.connect(to)?, canary.bytes())?;
            } else {
                expect_refusal(&client, to, canary.bytes())?;
            }
            let heard = answering.join().expect("the server does not panic");
            let got_it = heard.as_ref().is_ok_and(|bytes| canary.is_in(bytes));
            ensure!(got_it == is_victim, "the server heard {heard:?}");
            wire.stop()?.expect_absent(&canary)?;
        }
    }
    let mismatches = counted(&mesh.agents[0].status()?, "handshakes", "result", "identity");
    ensure!(mismatches == 2, "{mismatches} handshakes with another pod");

    // Nor is one without TLS spoken to.
    let application = Application::start(&victim, PORT)?;
    for to in victim.sockets(PORT) {
        let canary = Canary::random();
        let wire = mesh.lab.capture()?;
        expect_refusal(&client, to, canary.bytes())?;
        let (heard, _) = application.ended.recv_timeout(patience())?;
        ensure!(inspect(&heard)? == Hello::Client, "heard {heard:02x?}");
        wire.stop()?.expect_absent(&canary)?;
    }
    Ok(())
}

/// Agents of before know no tunnel of more than one connection at a time.
#[test]
fn an_agent_that_shares_no_tunnels_is_given_one_for_each_connection() -> Result<()> {
    const CONNECTIONS: usize = 12;
    let mut mesh = Mesh::new("an_agent_that_shares_no_tunnels")?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.plain_pod(1, "server")?);
    mesh.control.register(&server)?;
    mesh.wait_synced()?;
    let identity = Ca::of(&mesh.control)?.issue(&Claim::of(&server)?)?;
    let verifier = peer::verifier(&mesh.control)?;
    let listener = server.listen(PORT)?;
    thread::spawn(move || {
        while let Ok((stream, _)) = xtask::lab::traffic::accept(&listener) {
            let (verifier, identity) = (Arc::clone(&verifier), Arc::clone(&identity));
            thread::spawn(move || peer::serve(stream, verifier, identity));
        }
    });
    let to = server.sockets(PORT)[0];
    let canary = Canary::random();
    let wire = mesh.lab.capture()?;
    // All are open at a time.
    let mut connections = Vec::new();
    for n in 0..CONNECTIONS {
        let mut connection = client.connect(to)?;
        connection.write_all(canary.bytes())?;
        let mut answer = vec![0; canary.bytes().len()];
        connection.read_exact(&mut answer).with_context(|| format!("connection {n}"))?;
        ensure!(answer == canary.bytes(), "connection {n} answers {answer:?}");
        connections.push(connection);
    }
    let shared = mesh.status_of(&client)?["shared_tunnels"].as_u64();
    ensure!(shared == Some(0), "{shared:?} tunnels are shared");
    for mut connection in connections {
        connection.shutdown(Shutdown::Write)?;
        let mut rest = Vec::new();
        connection.read_to_end(&mut rest)?;
        ensure!(rest.is_empty(), "it goes on with {rest:?}");
    }
    wire.stop()?.expect_absent(&canary)
}
