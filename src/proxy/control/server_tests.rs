//! The socket with a handler that echoes: limits, stale files, wrong input.

use std::os::unix::net::UnixListener as StdListener;

use super::*;
use crate::proxy::control::client::{ControlClient, ControlClientError};
use crate::proxy::control::message::{Detached, Outcome};

struct Echo;

impl Handler for Echo {
    async fn handle(&self, request: ControlRequest, _: &mut Answers) -> io::Result<ControlAnswer> {
        let ControlRequest::Detach { node } = request else {
            return Ok(failure("only detach", "detach"));
        };
        let detached = Detached { node, was_member: true, members: Vec::new(), version: 2 };
        Ok(ControlAnswer::Result { result: Outcome::Detach(detached) })
    }
}

struct Running {
    folder: tempfile::TempDir,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), ControlError>>,
}

impl Running {
    fn path(&self) -> PathBuf {
        self.folder.path().join("control.sock")
    }

    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let running = Self { task: tokio::spawn(async { Ok(()) }), stop: CancellationToken::new(), folder };
        running.again().await
    }

    async fn again(mut self) -> Self {
        let (path, stop) = (self.path(), self.stop.clone());
        self.task = tokio::spawn(async move { serve(&path, Arc::new(Echo), stop).await });
        while ControlClient::connect(&self.path()).await.is_err() {
            assert!(!self.task.is_finished(), "{:?}", self.task.await);
            tokio::task::yield_now().await;
        }
        self
    }
}

async fn detach(path: &Path) -> ControlAnswer {
    let mut client = ControlClient::connect(path).await.unwrap();
    client.send(&ControlRequest::Detach { node: "b".into() }).await.unwrap();
    client.next().await.unwrap()
}

fn is_good(answer: &ControlAnswer) -> bool {
    matches!(answer, ControlAnswer::Result { result: Outcome::Detach(detached) } if detached.node == "b")
}

#[tokio::test]
async fn a_request_is_answered_and_the_socket_is_for_owner_and_group() {
    let running = Running::start().await;
    assert!(is_good(&detach(&running.path()).await));
    assert_eq!(fs::metadata(running.path()).unwrap().permissions().mode() & 0o777, 0o660);
    running.stop.cancel();
    running.task.await.unwrap().unwrap();
    assert!(!running.folder.path().join("control.sock").exists());
    let gone = ControlClient::connect(&running.folder.path().join("control.sock")).await;
    assert!(matches!(gone, Err(ControlClientError::NotRunning(_))));
}

#[tokio::test]
async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    drop(StdListener::bind(&path).unwrap());
    assert!(matches!(ControlClient::connect(&path).await, Err(ControlClientError::NotRunning(_))));
    let running =
        Running { task: tokio::spawn(async { Ok(()) }), stop: CancellationToken::new(), folder }.again().await;
    assert!(is_good(&detach(&running.path()).await));
    let second = serve(&running.path(), Arc::new(Echo), CancellationToken::new()).await;
    assert!(matches!(second, Err(ControlError::InUse(_))));
    assert!(is_good(&detach(&running.path()).await), "the first one still serves");
    running.stop.cancel();
}

#[tokio::test]
async fn a_file_in_the_way_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    fs::write(&path, "precious").unwrap();
    let error = serve(&path, Arc::new(Echo), CancellationToken::new()).await.unwrap_err();
    assert!(matches!(error, ControlError::NotASocket(_)));
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    let long = folder.path().join("x".repeat(120));
    let error = serve(&long, Arc::new(Echo), CancellationToken::new()).await.unwrap_err();
    assert!(matches!(error, ControlError::TooLong(_)), "{error}");
}

#[tokio::test]
async fn wrong_lines_get_a_sentence_and_harm_nobody() {
    let running = Running::start().await;
    for wrong in [b"{\"command\":\"destroy\"}\n".to_vec(), b"\xff\x00\n".to_vec(), vec![b'x'; LINE_BYTES_MAX + 1]] {
        let mut stream = UnixStream::connect(running.path()).await.unwrap();
        let (mut read, mut write) = stream.split();
        // A line that is too long is answered before all of it is read: writing may fail, reading must not.
        let (_, text) = tokio::join!(write.write_all(&wrong), async {
            let mut text = String::new();
            BufReader::new(&mut read).read_line(&mut text).await.unwrap();
            text
        });
        assert!(matches!(serde_json::from_str(&text), Ok(ControlAnswer::Error { .. })), "{text}");
    }
    assert!(is_good(&detach(&running.path()).await));
    running.stop.cancel();
}

#[tokio::test]
async fn connections_are_limited() {
    let running = Running::start().await;
    let mut held = Vec::new();
    while held.len() < CONNECTIONS_MAX {
        let mut client = ControlClient::connect(&running.path()).await.unwrap();
        client.send(&ControlRequest::Detach { node: "b".into() }).await.unwrap();
        // The connection that found the socket ready may still count.
        if client.next().await.is_ok_and(|answer| is_good(&answer)) {
            held.push(client);
        }
    }
    let mut one_more = ControlClient::connect(&running.path()).await.unwrap();
    let answer = one_more.next().await.unwrap();
    assert!(matches!(answer, ControlAnswer::Error { error } if error.what.contains("already")));
    drop(held);
    running.stop.cancel();
}
