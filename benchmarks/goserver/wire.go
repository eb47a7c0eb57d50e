package main

import (
	"net"
	"runtime"
	"sync"
	"syscall"
	"time"
)

// A wire is a TCP connection below TLS, which writes each record with a system call of its own. While the wire is held
// the records wait, and then go out with one: a server that flushes each event of a stream, or has many answers ready
// at once, spends its time on them and not in the kernel. Frames and records stay what they are.
type wire struct {
	net.Conn
	lock    sync.Mutex
	held    bool
	waiting []byte
	raw     syscall.RawConn
}

// As much may wait before it is written although the wire is held.
const mostHeld = 256 << 10

type wireListener struct{ net.Listener }

func (l wireListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return nil, err
	}
	return &wire{Conn: conn, raw: raw}, nil
}

func (w *wire) Write(data []byte) (int, error) {
	w.lock.Lock()
	defer w.lock.Unlock()
	if !w.held {
		return w.Conn.Write(data)
	}
	w.waiting = append(w.waiting, data...)
	if len(w.waiting) < mostHeld {
		return len(data), nil
	}
	return len(data), w.flush()
}

func (w *wire) hold() {
	w.lock.Lock()
	defer w.lock.Unlock()
	w.held = true
}

func (w *wire) release() error {
	w.lock.Lock()
	defer w.lock.Unlock()
	w.held = false
	return w.flush()
}

func (w *wire) flush() error {
	if len(w.waiting) == 0 {
		return nil
	}
	_, err := w.Conn.Write(w.waiting)
	w.waiting = w.waiting[:0]
	return err
}

// nudge wakes the one who waits to read, by a timeout, if there is something to read. On a single core nobody else would
// do that as long as there is more to write and room for it: Go looks at its sockets when it has nothing to run, or
// every 10 ms.
func (w *wire) nudge() {
	peeked := -1
	w.raw.Control(func(fd uintptr) {
		var one [1]byte
		peeked, _, _ = syscall.Recvfrom(int(fd), one[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
	})
	if peeked > 0 {
		w.SetReadDeadline(time.Unix(1, 0))
		runtime.Gosched()
	}
}
