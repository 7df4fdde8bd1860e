//! A COPY whose left-out columns have defaults that vary.
//!
//! The client's own COPY runs on the leader without a row: what is wrong with it is said as always, and the client is asked for its
//! data. When they are all there the leader computes the values that they lack, and one COPY of data and values runs on the leader;
//! followers get the same data.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use crate::pg::build::{self, ClientError};
use crate::pg::frame::{self, Sender};
use crate::pg::message::{self, Reader};
use crate::replicate::effects::{EffectLog, EffectsError, Range};
use crate::session::run::Session;
use crate::session::simple::{error_frame, refused};
use crate::session::wire::{End, Expect, Mode, Until};
use crate::sql::copy_dates::{CopyDates, CopyScanner};
use crate::sql::copy_fill::{CopyFill, Header};
use crate::sql::copy_rows::{CopyFormat, Piece, Rows};
use crate::sql::plan::Write;
use crate::sql::refuse::clock_literal;
use crate::sql::shape::Shape;

/// Rows whose values are asked of the leader at once.
const VALUES_MAX: u64 = 1000;
/// Bytes of data that are handled at once.
const PIECE_BYTES: u64 = 64 * 1024;

/// The client's data.
struct Gathered {
    data: EffectLog,
    range: Range,
    rows: u64,
    /// Every row has as many fields as the COPY names columns.
    well_formed: bool,
    reads_clock: bool,
    /// The message with which the client ended its data, unless that was CopyDone.
    ended_by: Option<BytesMut>,
}

impl Session {
    /// Takes the answer of the client's COPY, which was sent, and all that follows up to the effect. If the server had an error, it is
    /// in the results and the client has it; an error given is ours.
    pub async fn take_filled_copy(
        &mut self,
        write: &Write,
        fill: &CopyFill,
        dates: Option<&CopyDates>,
        shape: &Shape,
        text: &str,
    ) -> Result<Result<(), ClientError>, End> {
        let data = match self.fill_copy(fill, dates, text).await? {
            Ok(Some(data)) => data,
            Ok(None) => return Ok(Ok(())),
            Err(error) => return Ok(Err(error)),
        };
        Ok(self.copy_effect(write, shape, text, Some((data, 0))))
    }

    /// Gives where the completed data are in the effect list; None if the server had an error.
    async fn fill_copy(
        &mut self,
        fill: &CopyFill,
        dates: Option<&CopyDates>,
        text: &str,
    ) -> Result<Result<Option<Range>, ClientError>, End> {
        self.wire.pump(Until::AnsweredOrCopy).await?;
        if !self.wire.results.copy_in {
            return Ok(Ok(None));
        }
        build::copy_data(&mut self.wire.to_server, fill.no_rows());
        self.end_copy_data(None).await?;
        if self.wire.results.error.is_some() {
            return Ok(Ok(None));
        }
        let gathered = match self.gather(fill, dates).await? {
            Ok(gathered) => gathered,
            Err(error) => return Ok(Err(error.into())),
        };
        if gathered.ended_by.is_some() || !gathered.well_formed {
            return self.fail_naturally(text, gathered).await;
        }
        if gathered.reads_clock {
            return Ok(Err(refused(&clock_literal())));
        }
        let data = match self.complete(fill, &gathered).await? {
            Ok(Some(data)) => data,
            Ok(None) => return Ok(Ok(None)),
            Err(error) => return Ok(Err(error.into())),
        };
        self.wire.hide_errors = true;
        let done = self.copy_completed(fill, data).await;
        self.wire.hide_errors = false;
        if let Err(error) = done? {
            return Ok(Err(error.into()));
        }
        match &self.wire.results.error {
            Some(error) => {
                let error = with_own_line(error, fill, &gathered);
                self.wire.to_client.extend_from_slice(&error_frame(&error));
                Ok(Ok(None))
            }
            None => Ok(Ok(Some(data))),
        }
    }

    /// Reads the client's data up to their end.
    async fn gather(
        &mut self,
        fill: &CopyFill,
        dates: Option<&CopyDates>,
    ) -> Result<Result<Gathered, EffectsError>, End> {
        let mut rows = Rows::new(fill.format.clone());
        let mut dates = dates.map(CopyDates::scanner);
        let mut gathered = Gathered {
            data: EffectLog::new(Arc::clone(&self.hub.spill)),
            range: Range::default(),
            rows: 0,
            well_formed: true,
            reads_clock: false,
            ended_by: None,
        };
        let (mut header, mut kept) = (fill.header != Header::Row, Ok(()));
        let mut count = |rows: &mut Rows, gathered: &mut Gathered| {
            while let Some(piece) = rows.take() {
                if let Piece::Row { fields, .. } = piece
                    && !std::mem::take(&mut header)
                {
                    gathered.rows += 1;
                    gathered.well_formed &= fields == fill.given;
                }
            }
        };
        self.cycle.cut();
        self.wire.flush_client().await?;
        loop {
            while let Some(frame) =
                frame::take(&mut self.wire.from_client, Sender::Client).map_err(End::ClientProtocol)?
            {
                match frame[0] {
                    b'd' => {
                        let block = frame::body(&frame);
                        gathered.reads_clock |= dates.as_mut().is_some_and(|dates| dates.feed(block));
                        if kept.is_ok() {
                            kept = gathered.data.append(block).map(|added| gathered.range.len += added.len);
                        }
                        rows.feed(block);
                        count(&mut rows, &mut gathered);
                    }
                    // The server ignores Flush and Sync while it copies.
                    b'H' | b'S' => {}
                    b'X' => return Err(End::ClientGone),
                    tag => {
                        rows.finish();
                        count(&mut rows, &mut gathered);
                        gathered.well_formed &= !rows.is_broken();
                        gathered.reads_clock |= dates.as_mut().is_some_and(CopyScanner::finish);
                        gathered.ended_by = (tag != b'c').then_some(frame);
                        return Ok(kept.map(|()| gathered));
                    }
                }
            }
            self.wire.fill_either().await?;
            self.wire.absorb()?;
        }
    }

    /// The data with the leader's values, put into the effect list. None: the leader had an error, which the client has.
    async fn complete(
        &mut self,
        fill: &CopyFill,
        gathered: &Gathered,
    ) -> Result<Result<Option<Range>, EffectsError>, End> {
        let mut range = Range { start: self.log.bytes(), len: 0 };
        let mut rows = Rows::new(fill.format.clone());
        let mut header = fill.header != Header::Row;
        let (mut values, mut missing) = (VecDeque::new(), gathered.rows);
        let (mut block, mut out, mut at) = (Vec::new(), Vec::new(), 0);
        loop {
            let len = PIECE_BYTES.min(gathered.range.len - at);
            if let Err(error) = gathered.data.read(Range { start: gathered.range.start + at, len }, &mut block) {
                return Ok(Err(error));
            }
            at += len;
            if len == 0 {
                rows.finish();
            } else {
                rows.feed(&block);
            }
            while let Some(piece) = rows.take() {
                match piece {
                    Piece::Other(range) => out.extend_from_slice(rows.bytes(range)),
                    Piece::Row { content, end, .. } if std::mem::take(&mut header) => {
                        out.extend_from_slice(rows.bytes(content));
                        if let Header::Matched { rest, .. } = &fill.header {
                            out.extend_from_slice(rest);
                        }
                        out.extend_from_slice(rows.bytes(end));
                    }
                    Piece::Row { content, end, .. } => {
                        if values.is_empty() {
                            let count = missing.min(VALUES_MAX);
                            values.extend(self.values_of_defaults(fill, count).await?);
                            missing -= count;
                        }
                        // none: the leader had an error
                        let Some(row) = values.pop_front() else { return Ok(Ok(None)) };
                        let row = values_of_row(&row, fill.filled);
                        fill.format.put_row(rows.bytes(content), rows.bytes(end), &row, &mut out);
                    }
                }
            }
            if len == 0 || out.len() as u64 >= PIECE_BYTES {
                match self.log.append(&out) {
                    Ok(added) => range.len += added.len,
                    Err(error) => return Ok(Err(error)),
                }
                out.clear();
            }
            if len == 0 {
                return Ok(Ok(Some(range)));
            }
        }
    }

    /// Values of the left-out columns for so many rows.
    async fn values_of_defaults(&mut self, fill: &CopyFill, count: u64) -> Result<Vec<Bytes>, End> {
        const BINARY: [u8; 2] = [0, 1];
        self.wire.clear_results();
        let formats: &[u8] = if fill.format == CopyFormat::Binary { &BINARY } else { &[] };
        let count = count.to_string();
        let parameters = build::text_values(&[Some(count.as_bytes())]);
        self.parse_own(&fill.values);
        build::bind_raw(&mut self.wire.to_server, OWN_PORTAL, OWN_STATEMENT, &parameters, formats);
        build::execute(&mut self.wire.to_server, OWN_PORTAL, 0);
        let mode = Mode::Strip { hidden: fill.filled, client_returning: false };
        self.wire.expects.extend([Expect::Bind { hidden: true }, Expect::Execute { mode }]);
        self.close_own();
        self.end_hidden();
        self.wire.pump(Until::Answered).await?;
        Ok(std::mem::take(&mut self.wire.results.rows))
    }

    /// Prepares a statement of ours, also where an error kept an earlier one from being closed.
    fn parse_own(&mut self, text: &str) {
        self.close_own();
        build::parse(&mut self.wire.to_server, OWN_STATEMENT, text.as_bytes(), &[]);
        self.wire.expects.push_back(Expect::Parse { hidden: true });
    }

    fn close_own(&mut self) {
        build::close(&mut self.wire.to_server, b'P', OWN_PORTAL);
        build::close(&mut self.wire.to_server, b'S', OWN_STATEMENT);
        self.wire.expects.extend([Expect::Close { hidden: true }; 2]);
    }

    /// Sends a COPY of ours; the client has been asked for data already.
    async fn start_copy(&mut self, text: &str) -> Result<(), End> {
        self.wire.clear_results();
        if self.in_batch {
            self.parse_own(text);
            build::bind_text(&mut self.wire.to_server, OWN_PORTAL, OWN_STATEMENT, &[]);
            build::execute(&mut self.wire.to_server, OWN_PORTAL, 0);
            self.wire.expects.extend([Expect::Bind { hidden: true }, Expect::Execute { mode: Mode::Hidden }]);
            build::flush(&mut self.wire.to_server);
        } else {
            build::query(&mut self.wire.to_server, text.as_bytes());
            self.wire.expects.push_back(Expect::Query { mode: Mode::Hidden });
        }
        self.wire.pump(Until::AnsweredOrCopy).await
    }

    /// Sends data out of an effect list, until the server refuses them.
    async fn send_copy_data(&mut self, data: &EffectLog, range: Range) -> Result<Result<(), EffectsError>, End> {
        let (mut block, mut at) = (Vec::new(), 0);
        while at < range.len && self.wire.results.error.is_none() {
            let len = PIECE_BYTES.min(range.len - at);
            if let Err(error) = data.read(Range { start: range.start + at, len }, &mut block) {
                return Ok(Err(error));
            }
            at += len;
            build::copy_data(&mut self.wire.to_server, &block);
            self.wire.flush_server().await?;
            self.wire.absorb()?;
        }
        Ok(Ok(()))
    }

    /// Ends the data of a COPY under way, with CopyDone or with this message, and waits for its end.
    async fn end_copy_data(&mut self, with: Option<&[u8]>) -> Result<(), End> {
        if std::mem::take(&mut self.wire.results.copy_in) {
            match with {
                Some(frame) => self.wire.to_server.extend_from_slice(frame),
                None => build::copy_done(&mut self.wire.to_server),
            }
            if self.in_batch {
                // the portal of ours, if it was that; else nothing
                self.close_own();
                build::flush(&mut self.wire.to_server);
            }
        }
        self.wire.pump(Until::Answered).await
    }

    async fn copy_completed(&mut self, fill: &CopyFill, range: Range) -> Result<Result<(), EffectsError>, End> {
        self.start_copy(&fill.leader).await?;
        let fresh = EffectLog::new(Arc::clone(&self.hub.spill));
        let log = std::mem::replace(&mut self.log, fresh);
        let sent = self.send_copy_data(&log, range).await;
        self.log = log;
        let sent = sent?;
        let mut failed = BytesMut::new();
        if sent.is_err() {
            build::copy_fail(&mut failed, "the data can not be read");
        }
        self.end_copy_data(sent.is_err().then_some(&failed[..])).await?;
        Ok(sent)
    }

    /// The client gave up, or a row has too few or too many fields: the client's own COPY, with its own data, says so best.
    async fn fail_naturally(
        &mut self,
        text: &str,
        gathered: Gathered,
    ) -> Result<Result<Option<Range>, ClientError>, End> {
        self.start_copy(text).await?;
        if let Err(error) = self.send_copy_data(&gathered.data, gathered.range).await? {
            let mut failed = BytesMut::new();
            build::copy_fail(&mut failed, "the data can not be read");
            self.wire.hide_errors = true;
            let done = self.end_copy_data(Some(&failed)).await;
            self.wire.hide_errors = false;
            self.wire.results.error = None;
            return done.map(|()| Err(error.into()));
        }
        self.end_copy_data(gathered.ended_by.as_deref()).await?;
        if self.wire.results.error.is_some() {
            return Ok(Ok(None));
        }
        Ok(Err(ClientError::error(
            "0A000",
            "the server takes these data of a COPY for other rows than pgtandem does, which can not complete them",
            "Put all columns into the data.",
        )))
    }
}

const OWN_STATEMENT: &[u8] = b"pgtandem_c";
const OWN_PORTAL: &[u8] = b"pgtandem_p";

fn values_of_row(row: &[u8], columns: usize) -> Vec<Option<&[u8]>> {
    let mut r = Reader::new(b'D', row);
    (0..columns).map(|_| r.value().unwrap_or_default()).collect()
}

/// An error of the completed COPY as that of the client's own: `COPY t, line 3: "..."` quotes the client's line.
fn with_own_line(error: &Bytes, fill: &CopyFill, gathered: &Gathered) -> Bytes {
    let own = message::error_field(error, b'W').and_then(|context| {
        let context = String::from_utf8_lossy(context).into_owned();
        let (before, quoted) = context.split_once(": \"")?;
        let digits = before.bytes().rev().take_while(u8::is_ascii_digit).count();
        let number: u64 = before.get(before.len() - digits..)?.parse().ok()?;
        let line = line(fill, gathered, number)?;
        // What the server quotes begins as the client's line does; nothing but our values comes after it.
        let after = quoted.find("\"\n").map_or("\"", |end| quoted.get(end..).unwrap_or("\""));
        Some(format!("{before}: \"{}{after}", printed(&line)))
    });
    let Some(own) = own else { return error.clone() };
    let mut out = BytesMut::with_capacity(error.len());
    let mut r = Reader::new(b'E', error);
    while let (Ok(field @ 1..), Ok(value)) = (r.u8(), r.string()) {
        out.extend_from_slice(&[field]);
        out.extend_from_slice(if field == b'W' { own.as_bytes() } else { value });
        out.extend_from_slice(&[0]);
    }
    out.extend_from_slice(&[0]);
    out.freeze()
}

/// The client's line with this number, as the server counts: lines inside quotes count, too.
fn line(fill: &CopyFill, gathered: &Gathered, number: u64) -> Option<Vec<u8>> {
    let mut rows = Rows::new(fill.format.clone());
    let (mut block, mut at, mut lines) = (Vec::new(), 0, 0_u64);
    loop {
        let len = PIECE_BYTES.min(gathered.range.len - at);
        gathered.data.read(Range { start: gathered.range.start + at, len }, &mut block).ok()?;
        at += len;
        if len == 0 {
            rows.finish();
        } else {
            rows.feed(&block);
        }
        while let Some(piece) = rows.take() {
            if let Piece::Row { content, .. } = piece {
                let content = rows.bytes(content);
                let csv = matches!(fill.format, CopyFormat::Csv { .. });
                let inside = content.iter().filter(|byte| csv && **byte == b'\n').count();
                lines += 1 + u64::try_from(inside).unwrap_or(0);
                if lines >= number {
                    return Some(content.to_vec());
                }
            }
        }
        if len == 0 {
            return None;
        }
    }
}

/// `CopyLimitPrintoutLength` of PostgreSQL.
fn printed(line: &[u8]) -> String {
    const SHOWN_BYTES_MAX: usize = 100;
    let text = String::from_utf8_lossy(line);
    if text.len() <= SHOWN_BYTES_MAX {
        return text.into_owned();
    }
    let end = (0..=SHOWN_BYTES_MAX).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    format!("{}...", text.get(..end).unwrap_or_default())
}
