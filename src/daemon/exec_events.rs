//! The kernel's word about every `execve` of this host: the proc connector (`CN_IDX_PROC` of linux/cn_proc.h).
//!
//! A filter in the kernel lets only `execve` through, so that a host that forks all day wakes nobody. Needs
//! `CAP_NET_ADMIN` in the host's own network namespace; without, /proc is looked through instead.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

/// A message: netlink header (16 bytes), connector header (20), event.
const EVENT: usize = 16 + 20;
/// Where in an event the process is: after what, cpu and time stamp; PID of the thread, then of the process.
const TGID: usize = EVENT + 4 + 4 + 8 + 4;
const CN_IDX_PROC: u32 = 1;
const CN_VAL_PROC: u32 = 1;
const PROC_CN_MCAST_LISTEN: u32 = 1;
const PROC_EVENT_EXEC: u32 = 2;
/// The host's own PID namespace (`PROC_PID_INIT_INO` of linux/proc_ns.h). In any other, the kernel ignores who listens and
/// does not say so.
const HOSTS_PIDS: &str = "pid:[4026531836]";

/// The stream of events.
pub struct ExecEvents(OwnedFd);

/// What has happened since the last look.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Execs {
    /// Processes that run something else now.
    pub pids: Vec<i32>,
    /// Whether the kernel has dropped some: then all processes have to be looked at.
    pub lost: bool,
}

impl ExecEvents {
    /// Begins to listen.
    ///
    /// # Errors
    /// The host does not allow or does not have it.
    pub fn open() -> io::Result<Self> {
        if !std::fs::read_link("/proc/self/ns/pid").is_ok_and(|ns| ns == Path::new(HOSTS_PIDS)) {
            return Err(io::Error::other("this is not the host's PID namespace"));
        }
        let kind = libc::SOCK_DGRAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: socket takes no pointers.
        let fd = check(unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_CONNECTOR) })?;
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let events = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        events.filter()?;
        // SAFETY: all bytes zero is a valid address of this kind.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as u16;
        address.nl_groups = CN_IDX_PROC;
        let size = size_of_val(&address) as libc::socklen_t;
        // SAFETY: the address lives through the call and has the size that is given.
        check(unsafe { libc::bind(fd, (&raw const address).cast(), size) })?;
        events.listen()?;
        Ok(events)
    }

    /// Drops everything but `execve` in the kernel.
    fn filter(&self) -> io::Result<()> {
        let statement = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
        // The machine reads numbers as the network writes them; the message has them as this host does.
        let exec = PROC_EVENT_EXEC.swap_bytes();
        let program = [
            statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, EVENT as u32),
            statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, exec),
            statement(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
            statement(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
        ];
        let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
        let size = size_of_val(&filter) as libc::socklen_t;
        // SAFETY: the program and its header live through the call, which only reads them.
        check(unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                (&raw const filter).cast(),
                size,
            )
        })?;
        Ok(())
    }

    /// Asks the kernel for its messages.
    fn listen(&self) -> io::Result<()> {
        let mut message = Vec::with_capacity(EVENT + 4);
        let length = EVENT as u32 + 4;
        message.extend(length.to_ne_bytes());
        message.extend((libc::NLMSG_DONE as u16).to_ne_bytes());
        message.extend([0; 10]); // flags, sequence, sender: the kernel's to fill
        for word in [CN_IDX_PROC, CN_VAL_PROC, 0, 0] {
            message.extend(word.to_ne_bytes());
        }
        message.extend(4_u16.to_ne_bytes()); // the length of what follows
        message.extend(0_u16.to_ne_bytes());
        message.extend(PROC_CN_MCAST_LISTEN.to_ne_bytes());
        // SAFETY: the buffer lives through the call and has the length that is given.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) };
        if sent == message.len() as isize { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// What has happened since the last call; never waits.
    pub fn read(&self) -> Execs {
        let mut execs = Execs::default();
        let mut buffer = [0_u8; 4096];
        loop {
            // SAFETY: the buffer lives through the call and has the length that is given.
            let got = unsafe { libc::recv(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            match usize::try_from(got) {
                Ok(0) => return execs,
                Ok(length) => execs.pids.extend(pid_of(&buffer[..length])),
                Err(_) => match io::Error::last_os_error().raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::ENOBUFS) => execs.lost = true,
                    _ => break,
                },
            }
        }
        execs.pids.sort_unstable();
        execs.pids.dedup();
        execs
    }
}

impl AsFd for ExecEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The process of a message, if it is one about `execve`.
fn pid_of(message: &[u8]) -> Option<i32> {
    let word = |at: usize| Some(u32::from_ne_bytes(message.get(at..at + 4)?.try_into().ok()?));
    (word(EVENT)? == PROC_EVENT_EXEC).then_some(())?;
    i32::try_from(word(TGID)?).ok()
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn an_exec_is_told_and_a_fork_is_not() {
        let events = match ExecEvents::open() {
            Ok(events) => events,
            Err(e) => {
                println!("SKIPPED: the proc connector is not available ({e})");
                return;
            }
        };
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id() as i32;
        child.wait().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut seen = Vec::new();
        while !seen.contains(&pid) {
            assert!(Instant::now() < deadline, "no word of {pid} in {seen:?}");
            seen.extend(events.read().pids);
        }
        // A subshell is a fork alone.
        let mut shell = std::process::Command::new("sh").args(["-c", "(:) & wait"]).spawn().unwrap();
        shell.wait().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        let told: Vec<_> = events.read().pids.into_iter().filter(|p| *p > pid).collect();
        assert!(told.contains(&(shell.id() as i32)), "{told:?}");
    }

    #[test]
    fn what_is_no_such_message_names_nobody() {
        let mut message = [0_u8; TGID + 4];
        message[EVENT..EVENT + 4].copy_from_slice(&PROC_EVENT_EXEC.to_ne_bytes());
        message[TGID..].copy_from_slice(&7_u32.to_ne_bytes());
        assert_eq!(pid_of(&message), Some(7));
        assert_eq!(pid_of(&message[..TGID + 3]), None);
        message[EVENT] = 1;
        assert_eq!(pid_of(&message), None);
        assert_eq!(pid_of(&[]), None);
    }
}
