package main

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"runtime"
	"sync"
	"time"

	"benchserver/hpack"
)

// What net/http announces, and thus what clients meet elsewhere.
const (
	receiveWindow = 1 << 20
	receiveFrame  = 1 << 20
	receiveFields = 1<<20 + 320
	receiveTable  = 4096
)

// As long has a client for taking the notice that it has broken the protocol.
const farewell = time.Second

// A conn is one HTTP/2 connection. One goroutine reads: it takes frames (handle.go) and puts streams whose request has
// ended (requests.go) in line. Another one writes (write.go). No request has a goroutine of its own.
type conn struct {
	tls  *tls.Conn
	wire *wire
	most int // streams at once

	// The reader's own.
	decoder  *hpack.Decoder
	asked    request // what the header block says that is being decoded
	unended  header  // of a header block that CONTINUATION goes on with; its stream is 0 if there is none
	block    []byte
	arriving *arrival

	lock    sync.Mutex
	work    sync.Cond // for the writer
	streams map[uint32]*stream
	last    uint32 // the client's latest stream
	receive inflow
	window  int // bytes of DATA that may be sent
	initial int // a new stream's window
	frame   int // the longest payload that may be sent
	line    line
	starved []*stream // kept from sending by the connection's window
	control []byte    // frames that go out before all others
	ending  bool
	output
}

type request struct{ method, target string }

type stream struct {
	id       uint32
	request  request
	received int // bytes of the request's body
	receive  inflow
	window   int
	response response
	begun    bool // the header block was sent
	waiting  bool // for a WINDOW_UPDATE of its own
	gone     bool
	timer    *time.Timer
	behind   *stream
}

// serveFrames runs a connection until it ends.
func serveFrames(t *tls.Conn, streams int) {
	c := &conn{
		tls: t, wire: t.NetConn().(*wire), most: streams, streams: map[uint32]*stream{},
		receive: inflow{left: receiveWindow}, window: initialWindow, initial: initialWindow, frame: leastMaxFrame,
	}
	c.work.L = &c.lock
	c.decoder = hpack.NewDecoder(receiveTable, c.field)
	c.encoder = hpack.NewEncoder(&c.fields)
	c.control = appendSettings(nil,
		setting{settingMaxFrame, receiveFrame}, setting{settingMaxStreams, uint32(streams)},
		setting{settingMaxFields, receiveFields}, setting{settingTableSize, receiveTable},
		setting{settingWindow, receiveWindow}, setting{settingNoPriorities, 1})
	c.control = appendValues(c.control, frameWindowUpdate, 0, receiveWindow-initialWindow)
	written := make(chan struct{})
	go func() {
		defer close(written)
		c.write()
	}()
	c.end(c.read())
	<-written
}

// end stops the writer, which says why first if the client is to blame.
func (c *conn) end(err error) {
	c.lock.Lock()
	defer c.lock.Unlock()
	for _, s := range c.streams {
		c.drop(s)
	}
	c.ending = true
	if v, ok := err.(violation); ok {
		c.wire.SetWriteDeadline(time.Now().Add(farewell))
		c.control = appendHeader(c.control, header{8 + len(v.reason), frameGoAway, 0, 0})
		c.control = binary.BigEndian.AppendUint32(c.control, c.last)
		c.control = binary.BigEndian.AppendUint32(c.control, v.code)
		c.control = append(c.control, v.reason...)
	} else {
		c.wire.Conn.Close()
	}
	c.work.Signal()
}

func (c *conn) read() error {
	buffer := make([]byte, 32<<10) // a TLS record, and what there is of a frame before it
	if _, err := io.ReadFull(c.tls, buffer[:len(preface)]); err != nil {
		return err
	}
	if string(buffer[:len(preface)]) != preface {
		return violation{codeProtocol, "this is not HTTP/2"}
	}
	filled := 0
	for {
		n, err := c.tls.Read(buffer[filled:])
		if errors.Is(err, os.ErrDeadlineExceeded) { // the writer's nudge
			c.wire.SetReadDeadline(time.Time{})
			continue
		}
		if err != nil {
			return err
		}
		filled += n
		used, err := c.take(buffer[:filled])
		if err != nil {
			return err
		}
		filled = copy(buffer, buffer[used:filled])
		if filled == len(buffer) {
			buffer = append(buffer, make([]byte, len(buffer))...)
		}
	}
}

// take handles the frames that data begins with, and says how much of it they were. What is to be written then goes
// out together with what further reads bring, as long as these don't have to wait; but a client may need a window or an
// acknowledgement to go on.
func (c *conn) take(data []byte) (int, error) {
	c.lock.Lock()
	used, err := c.frames(data)
	urgent := len(c.control) > 0
	if urgent || c.line.first != nil {
		c.work.Signal()
	}
	c.lock.Unlock()
	if urgent {
		runtime.Gosched()
	}
	return used, err
}

func (c *conn) frames(data []byte) (int, error) {
	used := 0
	for {
		n, err := c.arrived(len(data) - used)
		if err != nil {
			return used, err
		}
		used += n
		rest := data[used:]
		if c.arriving != nil || len(rest) < headerSize {
			return used, nil
		}
		h := parseHeader(rest)
		size := headerSize + h.length
		if h.kind == frameData {
			size = headerSize + h.padLength() // the rest is taken as it comes
		}
		if err := c.check(h); err != nil || len(rest) < size {
			return used, err
		}
		if err := c.handle(h, rest[headerSize:size]); err != nil {
			return used, err
		}
		used += size
	}
}
