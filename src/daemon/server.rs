//! The daemon's sockets: the control socket, and the one for Prometheus if there is one.
//!
//! Everything that comes in is untrusted: a bounded number of connections, bounded messages, a deadline for each, and
//! nothing is ever waited for. Who a peer of the control socket is, the kernel says.

use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::poll::PollFlags;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::protocol::MAX_REQUEST;
use crate::errors::Failure;

/// So many connections at once; who comes then is turned away.
const MAX_CONNECTIONS: usize = 64;
/// How long a peer may take to say what it wants, and to read the answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A user on the control socket.
    User(u32),
    /// A scraper of the metrics, who may do nothing else.
    Scraper,
}

/// What a connection wants, with the number under which it is answered.
#[derive(Debug, PartialEq, Eq)]
pub struct Incoming {
    /// Which connection.
    pub number: u64,
    /// Who.
    pub peer: Peer,
    /// What it has said: a line of the control socket, the head of an HTTP request.
    pub text: Vec<u8>,
}

enum Listener {
    Control(UnixListener),
    UnixMetrics(UnixListener),
    TcpMetrics(TcpListener),
}

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

struct Connection {
    number: u64,
    stream: Stream,
    peer: Peer,
    said: Vec<u8>,
    /// What is still to be sent, once there is an answer.
    answer: Option<Vec<u8>>,
    asked: bool,
    deadline: Instant,
}

/// The sockets, removed when dropped.
pub struct Server {
    listeners: Vec<Listener>,
    connections: Vec<Connection>,
    next: u64,
    paths: Vec<PathBuf>,
    _lock: Flock<File>,
}

impl Server {
    /// Takes the lock that makes this the only daemon, and listens.
    ///
    /// # Errors
    /// Refused if another daemon runs; failed if the socket can't be made.
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let broken = |e: io::Error| {
            Failure::failed(format!("listen on {}", path.display()), e).help("name another place with --socket")
        };
        let dir = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if !dir.is_dir() {
            fs::create_dir_all(dir).map_err(broken)?;
            // Anyone may ask for the status.
            fs::set_permissions(dir, Permissions::from_mode(0o755)).map_err(broken)?;
        }
        let file = File::options().create(true).truncate(false).write(true).open(with_suffix(path, ".lock"));
        let lock = match Flock::lock(file.map_err(broken)?, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                return Err(Failure::refused("start the daemon", "another one runs already")
                    .help("`dyni status` asks it, `dyni stop` ends it"));
            }
            Err((_, e)) => return Err(broken(e.into())),
        };
        // One that was killed has left its socket; the lock says that nobody uses it.
        remove(path).map_err(broken)?;
        let listener = UnixListener::bind(path).map_err(broken)?;
        fs::set_permissions(path, Permissions::from_mode(0o666)).map_err(broken)?;
        listener.set_nonblocking(true).map_err(broken)?;
        Ok(Self {
            listeners: vec![Listener::Control(listener)],
            connections: Vec::new(),
            next: 0,
            paths: vec![path.to_owned()],
            _lock: lock,
        })
    }

    /// Listens for Prometheus, too: on `unix:PATH`, or on a loopback address and port.
    ///
    /// # Errors
    /// The address makes no sense, is not loopback, or can't be had.
    pub fn open_metrics(&mut self, address: &str) -> Result<(), Failure> {
        let broken = |e: io::Error| Failure::failed(format!("serve metrics on {address}"), e);
        if let Some(path) = address.strip_prefix("unix:") {
            let path = Path::new(path);
            remove(path).map_err(broken)?;
            let listener = UnixListener::bind(path).map_err(broken)?;
            listener.set_nonblocking(true).map_err(broken)?;
            self.paths.push(path.to_owned());
            self.listeners.push(Listener::UnixMetrics(listener));
            return Ok(());
        }
        let wrong = || {
            Failure::usage(
                format!("serve metrics on {address}"),
                "it is neither unix:PATH nor a loopback address and port",
            )
            .help("as in --metrics unix:/run/dyni/metrics.sock or --metrics 127.0.0.1:9618")
        };
        let address: SocketAddr = address.parse().map_err(|_| wrong())?;
        if !address.ip().is_loopback() {
            return Err(wrong());
        }
        let listener = TcpListener::bind(address).map_err(broken)?;
        listener.set_nonblocking(true).map_err(broken)?;
        self.listeners.push(Listener::TcpMetrics(listener));
        Ok(())
    }

    /// What is to be waited for.
    pub fn waits(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let listeners = self.listeners.iter().map(|l| {
            let fd = match l {
                Listener::Control(l) | Listener::UnixMetrics(l) => l.as_fd(),
                Listener::TcpMetrics(l) => l.as_fd(),
            };
            (fd, PollFlags::POLLIN)
        });
        let connections = self.connections.iter().map(|c| {
            let fd = match &c.stream {
                Stream::Unix(s) => s.as_fd(),
                Stream::Tcp(s) => s.as_fd(),
            };
            let wanted = match (&c.answer, c.asked) {
                (Some(_), _) => PollFlags::POLLOUT,
                (None, false) => PollFlags::POLLIN,
                // It is being worked on; only a hang-up is of interest, and that is always told.
                (None, true) => PollFlags::empty(),
            };
            (fd, wanted)
        });
        listeners.chain(connections)
    }

    /// When a connection's time is over, at the earliest.
    pub fn deadline(&self) -> Option<Instant> {
        self.connections.iter().filter(|c| !c.asked || c.answer.is_some()).map(|c| c.deadline).min()
    }

    /// Accepts, reads and writes as far as that goes without waiting; whole requests.
    pub fn turn(&mut self) -> Vec<Incoming> {
        self.accept();
        let mut incoming = Vec::new();
        let now = Instant::now();
        self.connections.retain_mut(|c| {
            let open = c.read(&mut incoming) && c.write();
            open && (now < c.deadline || (c.asked && c.answer.is_none()))
        });
        incoming
    }

    /// Answers a connection, if it is still there.
    pub fn answer(&mut self, number: u64, text: Vec<u8>) {
        if let Some(c) = self.connections.iter_mut().find(|c| c.number == number) {
            c.answer = Some(text);
            c.deadline = Instant::now() + PATIENCE;
        }
        // Most answers fit into the socket at once.
        self.connections.retain_mut(|c| c.number != number || c.write());
    }

    fn accept(&mut self) {
        for listener in &self.listeners {
            // Bounded: the rest is there at the next turn.
            for _ in 0..MAX_CONNECTIONS {
                let Some((stream, peer)) = listener.accept() else { break };
                if self.connections.len() >= MAX_CONNECTIONS {
                    continue;
                }
                self.next += 1;
                self.connections.push(Connection {
                    number: self.next,
                    stream,
                    peer,
                    said: Vec::new(),
                    answer: None,
                    asked: false,
                    deadline: Instant::now() + PATIENCE,
                });
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for path in &self.paths {
            // The lock is still held, so nobody else's socket can be there.
            let _ = fs::remove_file(path);
        }
    }
}

impl Listener {
    fn accept(&self) -> Option<(Stream, Peer)> {
        match self {
            Self::Control(l) => {
                let (stream, _) = l.accept().ok()?;
                stream.set_nonblocking(true).ok()?;
                let uid = getsockopt(&stream, PeerCredentials).ok()?.uid();
                Some((Stream::Unix(stream), Peer::User(uid)))
            }
            Self::UnixMetrics(l) => {
                let (stream, _) = l.accept().ok()?;
                stream.set_nonblocking(true).ok()?;
                Some((Stream::Unix(stream), Peer::Scraper))
            }
            Self::TcpMetrics(l) => {
                let (stream, _) = l.accept().ok()?;
                stream.set_nonblocking(true).ok()?;
                Some((Stream::Tcp(stream), Peer::Scraper))
            }
        }
    }
}

impl Connection {
    /// Whether it goes on.
    fn read(&mut self, incoming: &mut Vec<Incoming>) -> bool {
        if self.asked {
            return true;
        }
        let mut buffer = [0; 1024];
        loop {
            match self.stream.as_read().read(&mut buffer) {
                Ok(0) => return false,
                Ok(n) => self.said.extend_from_slice(&buffer[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return true,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return false,
            }
            let end: &[u8] = if self.peer == Peer::Scraper { b"\r\n\r\n" } else { b"\n" };
            if self.said.windows(end.len()).any(|w| w == end) {
                self.asked = true;
                let text = std::mem::take(&mut self.said);
                incoming.push(Incoming { number: self.number, peer: self.peer, text });
                return true;
            }
            if self.said.len() > MAX_REQUEST {
                return false;
            }
        }
    }

    /// Whether it goes on.
    fn write(&mut self) -> bool {
        let Some(answer) = &mut self.answer else { return true };
        while !answer.is_empty() {
            match self.stream.as_write().write(answer) {
                Ok(0) => return false,
                Ok(n) => drop(answer.drain(..n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return true,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        false
    }
}

impl Stream {
    fn as_read(&mut self) -> &mut dyn Read {
        match self {
            Self::Unix(s) => s,
            Self::Tcp(s) => s,
        }
    }

    fn as_write(&mut self) -> &mut dyn Write {
        match self {
            Self::Unix(s) => s,
            Self::Tcp(s) => s,
        }
    }
}

/// A file beside the socket.
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn remove(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::FileTypeExt;
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => fs::remove_file(path),
        Ok(_) => Err(io::Error::new(ErrorKind::AlreadyExists, "something that is no socket is there")),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server() -> (tempfile::TempDir, PathBuf, Server) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let server = Server::open(&path).unwrap();
        (dir, path, server)
    }

    #[test]
    fn a_line_comes_in_with_its_sender_and_the_answer_goes_out() {
        let (_dir, path, mut server) = server();
        let mut peer = UnixStream::connect(&path).unwrap();
        peer.write_all(b"hal").unwrap();
        assert_eq!(server.turn(), []);
        peer.write_all(b"lo\nmore").unwrap();
        let incoming = server.turn();
        assert_eq!(incoming.len(), 1);
        assert!(incoming[0].text.starts_with(b"hallo\n"));
        assert_eq!(incoming[0].peer, Peer::User(nix::unistd::geteuid().as_raw()));
        server.answer(incoming[0].number, b"goodbye\n".to_vec());
        let mut answer = String::new();
        peer.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "goodbye\n");
    }

    #[test]
    fn who_talks_without_end_is_hung_up_on() {
        let (_dir, path, mut server) = server();
        let mut peer = UnixStream::connect(&path).unwrap();
        peer.write_all(&vec![b'x'; MAX_REQUEST + 1024]).unwrap();
        assert_eq!(server.turn(), []);
        assert!(server.connections.is_empty());
    }

    #[test]
    fn so_many_connections_and_no_more() {
        let (_dir, path, mut server) = server();
        let peers: Vec<_> = (0..MAX_CONNECTIONS + 8)
            .map(|_| {
                server.turn();
                UnixStream::connect(&path).unwrap()
            })
            .collect();
        server.turn();
        assert_eq!(server.connections.len(), MAX_CONNECTIONS);
        drop(peers);
        server.turn();
        assert!(server.connections.is_empty());
    }

    #[test]
    fn one_daemon_and_the_socket_of_a_dead_one_is_no_obstacle() {
        let (_dir, path, first) = server();
        let second = Server::open(&path).err().unwrap();
        assert!(second.to_string().contains("another one runs"), "{second}");
        // As after a kill: the file stays, the lock goes.
        let mut first = first;
        first.paths.clear();
        drop(first);
        assert!(path.exists());
        drop(Server::open(&path).unwrap());
        assert!(!path.exists());
        fs::write(&path, "a file").unwrap();
        assert!(Server::open(&path).err().unwrap().to_string().contains("no socket"));
    }

    #[test]
    fn metrics_are_for_this_host_alone() {
        let (_dir, _path, mut server) = server();
        for wrong in ["0.0.0.0:0", "192.0.2.1:80", "9618", "localhost", ""] {
            assert!(server.open_metrics(wrong).is_err(), "{wrong}");
        }
        server.open_metrics("127.0.0.1:0").unwrap();
    }
}
