//! Connections that can be reset from inside a handler, and bodies that are read from a file.

use std::io::{self, Read as _};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use http_body::Frame;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, Sleep};

/// Resets one connection: the peer sees ECONNRESET instead of an answer.
#[derive(Debug, Clone, Default)]
pub(super) struct Cut(Arc<AtomicBool>);

impl Cut {
    pub(super) fn reset(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Accepts connections whose [`Cut`] the handlers get.
pub(super) struct Wires(pub(super) TcpListener);

impl Listener for Wires {
    type Io = Wire;
    type Addr = Cut;

    async fn accept(&mut self) -> (Wire, Cut) {
        let (stream, _) = Listener::accept(&mut self.0).await;
        let cut = Cut::default();
        (
            Wire {
                stream,
                cut: cut.clone(),
            },
            cut,
        )
    }

    fn local_addr(&self) -> io::Result<Cut> {
        Ok(Cut::default())
    }
}

impl Connected<IncomingStream<'_, Wires>> for Cut {
    fn connect_info(stream: IncomingStream<'_, Wires>) -> Self {
        stream.io().cut.clone()
    }
}

/// A TCP stream that fails, and resets its peer, once it is cut.
pub(super) struct Wire {
    stream: TcpStream,
    cut: Cut,
}

impl Wire {
    fn alive(&self) -> io::Result<()> {
        if !self.cut.0.load(Ordering::Acquire) {
            return Ok(());
        }
        self.stream.set_zero_linger()?;
        Err(io::ErrorKind::ConnectionReset.into())
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.alive()?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.alive()?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.alive()?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.alive()?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// The next piece of a request's body; `None` at its end.
pub(super) async fn next_chunk(body: &mut Body) -> Option<Result<Bytes, axum::Error>> {
    loop {
        let frame = std::future::poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await?;
        match frame.map(Frame::into_data) {
            Ok(Ok(bytes)) => return Some(Ok(bytes)),
            Ok(Err(_)) => {}
            Err(error) => return Some(Err(error)),
        }
    }
}

/// Reads a body to its end and throws it away, so that the caller reads our answer.
pub(super) async fn drain(mut body: Body) {
    while let Some(Ok(_)) = next_chunk(&mut body).await {}
}

/// A response body taken from a reader, with what may go wrong on its way.
pub(super) struct Outflow {
    source: Box<dyn io::Read + Send>,
    /// Bytes until the body ends, or breaks.
    left: u64,
    /// Break the connection when `left` is used up.
    breaks: bool,
    bytes_per_second: Option<u64>,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Outflow {
    pub(super) fn new(source: Box<dyn io::Read + Send>, length: u64) -> Self {
        Self {
            source,
            left: length,
            breaks: false,
            bytes_per_second: None,
            pause: None,
        }
    }

    #[must_use]
    pub(super) fn cut_after(self, bytes: u64) -> Self {
        Self {
            breaks: bytes < self.left,
            left: self.left.min(bytes),
            ..self
        }
    }

    #[must_use]
    pub(super) fn bytes_per_second(self, rate: u64) -> Self {
        Self {
            bytes_per_second: Some(rate.max(1)),
            ..self
        }
    }
}

impl HttpBody for Outflow {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(cx));
            self.pause = None;
        }
        if self.left == 0 {
            let broken = self
                .breaks
                .then(|| Err(io::ErrorKind::ConnectionReset.into()));
            return Poll::Ready(broken);
        }
        // At a slow rate a tenth of a second's bytes, at least one, makes a piece.
        let piece = self
            .bytes_per_second
            .map_or(1 << 16, |rate| (rate / 10).max(1));
        if let Some(rate) = self.bytes_per_second {
            let wait = Duration::from_secs_f64(piece as f64 / rate as f64);
            self.pause = Some(Box::pin(tokio::time::sleep_until(Instant::now() + wait)));
        }
        let mut bytes = Vec::new();
        let want = piece.min(self.left);
        let read = self.source.as_mut().take(want).read_to_end(&mut bytes)?;
        if read == 0 {
            return Poll::Ready(None);
        }
        self.left -= read as u64;
        Poll::Ready(Some(Ok(Frame::data(bytes.into()))))
    }
}
