//! The network between the hosts: every connection from one host to another one's agent goes through here, and can be held up or slowed,
//! each way by itself. What is held is not lost, as TCP would send it again.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

/// Pieces of one connection that are under way; a slow way fills up like a real one.
const UNDER_WAY_MAX: usize = 256;
const PIECE_BYTES: usize = 16 << 10;

/// One way from a host to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Way {
    pub is_blocked: bool,
    pub delay_ms: u64,
}

type Receiver = watch::Receiver<Way>;

/// Every way between two hosts, by their numbers.
pub struct Links {
    ways: BTreeMap<(usize, usize), watch::Sender<Way>>,
    /// Where a host connects to reach another one's agent.
    addresses: BTreeMap<(usize, usize), SocketAddr>,
    tasks: Vec<JoinHandle<()>>,
}

impl Links {
    /// `agents`: where each host's agent listens.
    pub async fn between(agents: &[SocketAddr]) -> Self {
        let hosts = 0..agents.len();
        let pairs = hosts.clone().flat_map(|from| hosts.clone().map(move |to| (from, to)));
        let pairs: Vec<(usize, usize)> = pairs.filter(|(from, to)| from != to).collect();
        let ways: BTreeMap<_, _> = pairs.iter().map(|pair| (*pair, watch::Sender::new(Way::default()))).collect();
        let (mut addresses, mut tasks) = (BTreeMap::new(), Vec::new());
        for (from, to) in pairs {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
            addresses.insert((from, to), listener.local_addr().expect("a port"));
            let (there, back) = (ways[&(from, to)].subscribe(), ways[&(to, from)].subscribe());
            tasks.push(tokio::spawn(accept(listener, agents[to], there, back)));
        }
        Self { ways, addresses, tasks }
    }

    pub fn address(&self, from: usize, to: usize) -> SocketAddr {
        self.addresses[&(from, to)]
    }

    /// From now on this way is so.
    pub fn set(&self, from: usize, to: usize, way: Way) {
        self.ways[&(from, to)].send_replace(way);
    }

    pub fn heal(&self) {
        for way in self.ways.values() {
            way.send_replace(Way::default());
        }
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

async fn accept(listener: TcpListener, to: SocketAddr, there: Receiver, back: Receiver) {
    // They end with the listener.
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((from, _)) = accepted else { continue };
                connections.spawn(connect(from, to, there.clone(), back.clone()));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn open(way: &mut Receiver) {
    // Its sender lives as long as this.
    let _ = way.wait_for(|way| !way.is_blocked).await;
}

async fn connect(from: TcpStream, to: SocketAddr, mut there: Receiver, mut back: Receiver) {
    // A connection needs both ways.
    open(&mut there).await;
    open(&mut back).await;
    let Ok(to) = TcpStream::connect(to).await else { return };
    let (Ok(()), Ok(())) = (from.set_nodelay(true), to.set_nodelay(true)) else { return };
    let ((from_read, from_write), (to_read, to_write)) = (from.into_split(), to.into_split());
    let passed = tokio::try_join!(pass(from_read, to_write, there.clone()), pass(to_read, from_write, back.clone()));
    if passed.is_err() {
        // One side is gone; the other one hears of it when it can hear anything.
        open(&mut there).await;
        open(&mut back).await;
    }
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut way: Receiver) -> std::io::Result<()> {
    let (sender, mut under_way) = mpsc::channel::<(Instant, Vec<u8>)>(UNDER_WAY_MAX);
    let delay = way.clone();
    let read = async move {
        loop {
            let mut piece = vec![0; PIECE_BYTES];
            let read = from.read(&mut piece).await?;
            piece.truncate(read);
            let due = Instant::now() + Duration::from_millis(delay.borrow().delay_ms);
            if read == 0 || sender.send((due, piece)).await.is_err() {
                return std::io::Result::Ok(());
            }
        }
    };
    let write = async {
        while let Some((due, piece)) = under_way.recv().await {
            tokio::time::sleep_until(due).await;
            open(&mut way).await;
            to.write_all(&piece).await?;
        }
        open(&mut way).await;
        to.shutdown().await
    };
    tokio::try_join!(read, write).map(|_| ())
}

#[tokio::test]
async fn a_way_is_held_up_and_nothing_is_lost() {
    let agent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let nowhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
    let links = Links::between(&[nowhere, agent.local_addr().unwrap()]).await;
    let mut client = TcpStream::connect(links.address(0, 1)).await.unwrap();
    let (mut server, _) = agent.accept().await.unwrap();
    let mut byte = [0];
    client.write_all(b"a").await.unwrap();
    server.read_exact(&mut byte).await.unwrap();
    links.set(0, 1, Way { is_blocked: true, delay_ms: 0 });
    client.write_all(b"b").await.unwrap();
    // The other way is open.
    server.write_all(b"c").await.unwrap();
    client.read_exact(&mut byte).await.unwrap();
    assert_eq!(&byte, b"c");
    let held = tokio::time::timeout(Duration::from_millis(100), server.read_exact(&mut byte)).await;
    assert!(held.is_err(), "it was not held up");
    links.heal();
    server.read_exact(&mut byte).await.unwrap();
    assert_eq!(&byte, b"b");
    drop(client);
    assert_eq!(server.read(&mut byte).await.unwrap(), 0);
}
