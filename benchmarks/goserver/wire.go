package main

import (
	"net"
	"sync"
)

// A wire is a TCP connection below TLS, which writes each record with a system call of its own. While the wire is held
// the records wait, and then go out with one: a server that flushes each event of a stream, or has many answers ready
// at once, spends its time on them and not in the kernel. Frames and records stay what they are.
type wire struct {
	net.Conn
	lock    sync.Mutex
	held    bool
	waiting []byte
}

// As much may wait before it is written although the wire is held.
const mostHeld = 256 << 10

type wireListener struct{ net.Listener }

func (l wireListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &wire{Conn: conn}, nil
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
