// Go's net/http as the reference outside Python: the workloads of workloads.py, measured in the same way.
//
//	goclient -url https://HOST:PORT -stats HOST:PORT -ca FILE SCENARIO name=number ...
//
// One line of JSON on standard output says what it cost.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"math/rand"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const mib = 1 << 20

type metrics map[string]float64

type serverStats struct {
	Connections float64 `json:"connections"`
	CPUSeconds  float64 `json:"cpu_seconds"`
	Procs       float64 `json:"procs"`
}

var (
	base, statsAddress string
	parameters         = map[string]float64{}
	client             *http.Client
	body               = []byte(`{"prompt": "` + strings.Repeat("x", 186) + `"}`)
)

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func number(name string) int { return int(parameters[name]) }

func seconds(name string) time.Duration {
	return time.Duration(parameters[name] * float64(time.Second))
}

func aside(method, path string, into any) {
	request, err := http.NewRequest(method, "http://"+statsAddress+path, nil)
	check(err)
	response, err := http.DefaultClient.Do(request)
	check(err)
	defer response.Body.Close()
	if into != nil {
		check(json.NewDecoder(response.Body).Decode(into))
	}
}

func cpu() float64 {
	var usage syscall.Rusage
	check(syscall.Getrusage(syscall.RUSAGE_SELF, &usage))
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano()).Seconds()
}

// machine is the CPU that anybody has used, in seconds; 0 where there is no /proc.
func machine() float64 {
	content, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	line, _, _ := strings.Cut(string(content), "\n")
	fields := strings.Fields(line)
	total := 0.0
	for _, i := range []int{1, 2, 3, 8} {
		ticks, err := strconv.ParseFloat(fields[i], 64)
		check(err)
		total += ticks
	}
	return total / 100
}

// resident is the memory in use, in KiB.
func resident() float64 {
	content, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	pages, err := strconv.ParseFloat(strings.Fields(string(content))[1], 64)
	check(err)
	return pages * float64(os.Getpagesize()) / 1024
}

// window is the measured span.
type window struct {
	server             serverStats
	wall               time.Time
	cpu, machine, took float64
}

func measure() *window {
	w := &window{}
	aside("GET", "/stats", &w.server)
	w.machine = machine()
	w.wall, w.cpu = time.Now(), cpu()
	return w
}

func (w *window) stop() *window {
	w.took = time.Since(w.wall).Seconds()
	w.cpu = cpu() - w.cpu
	w.machine = machine() - w.machine
	return w
}

func (w *window) metrics(units float64) metrics {
	var after serverStats
	aside("GET", "/stats", &after)
	server := after.CPUSeconds - w.server.CPUSeconds
	return metrics{
		"units": units, "seconds": w.took, "per_second": units / w.took, "cpu_us": w.cpu / max(units, 1) * 1e6,
		"client_busy": w.cpu / w.took, "server_busy": server / w.took / after.Procs,
		"others_busy": max(0, w.machine-w.cpu-server) / w.took, "connections": after.Connections,
	}
}

func percentile(values []float64, share float64) float64 {
	ordered := slices.Sorted(slices.Values(values))
	return ordered[min(len(ordered)-1, int(float64(len(ordered))*share))]
}

func (m metrics) latencies(times []float64) metrics {
	if len(times) > 0 {
		m["p50_ms"], m["p99_ms"] = percentile(times, 0.5)*1e3, percentile(times, 0.99)*1e3
	}
	return m
}

func post(c context.Context, url string) error {
	request, err := http.NewRequestWithContext(c, "POST", url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err == nil && len(answer) != 500 {
		err = fmt.Errorf("an answer of 500 bytes was asked for, %d came", len(answer))
	}
	return err
}

func ask() { check(post(context.Background(), base+"/answer?size=500")) }

// get reads a body, handing it out as it comes.
func get(c context.Context, path string, each func(int) bool) error {
	request, err := http.NewRequestWithContext(c, "GET", base+path, nil)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	buffer := make([]byte, 256<<10)
	for {
		n, err := response.Body.Read(buffer)
		if !each(n) || err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func together(number int, run func(int)) {
	var group sync.WaitGroup
	for i := range number {
		group.Go(func() { run(i) })
	}
	group.Wait()
}

func rr() metrics {
	times := make([][]float64, number("concurrency"))
	round := func(length time.Duration) {
		until := time.Now().Add(length)
		together(len(times), func(i int) {
			times[i] = times[i][:0]
			for start := time.Now(); start.Before(until); start = time.Now() {
				ask()
				times[i] = append(times[i], time.Since(start).Seconds())
			}
		})
	}
	ask()
	round(seconds("warmup"))
	w := measure()
	round(seconds("seconds"))
	w.stop()
	all := slices.Concat(times...)
	return w.metrics(float64(len(all))).latencies(all)
}

func download() metrics {
	size := number("mib") * mib
	var times []float64
	ask()
	w := measure()
	for range number("repeats") {
		start, received := time.Now(), 0
		check(get(context.Background(), fmt.Sprintf("/bytes?size=%d", size), func(n int) bool { received += n; return true }))
		if received != size {
			log.Fatalf("%d bytes were asked for, %d came", size, received)
		}
		times = append(times, time.Since(start).Seconds())
	}
	m := w.stop().metrics(parameters["mib"] * float64(len(times)))
	m["per_second"], m["first"] = parameters["mib"]/percentile(times, 0.5), parameters["mib"]/times[0]
	return m
}

func upload() metrics {
	content := make([]byte, number("mib")*mib)
	var times []float64
	ask()
	w := measure()
	for range number("repeats") {
		start := time.Now()
		response, err := client.Post(base+"/sink", "application/octet-stream", bytes.NewReader(content))
		check(err)
		answer, err := io.ReadAll(response.Body)
		check(err)
		response.Body.Close()
		if string(answer) != strconv.Itoa(len(content)) {
			log.Fatalf("%d bytes were sent, %s arrived", len(content), answer)
		}
		times = append(times, time.Since(start).Seconds())
	}
	m := w.stop().metrics(parameters["mib"] * float64(len(times)))
	m["per_second"], m["first"] = parameters["mib"]/percentile(times, 0.5), parameters["mib"]/times[0]
	return m
}

func sse() metrics {
	ask()
	w := measure()
	response, err := client.Get(fmt.Sprintf("%s/events?count=%d", base, number("events")))
	check(err)
	defer response.Body.Close()
	events := 0
	for lines := bufio.NewScanner(response.Body); lines.Scan(); {
		if bytes.HasPrefix(lines.Bytes(), []byte("data:")) {
			events++
		}
	}
	w.stop()
	if events != number("events") {
		log.Fatalf("%d events were asked for, %d came", number("events"), events)
	}
	return w.metrics(float64(events))
}

func bulkLatency() metrics {
	bulk, cancel := context.WithCancel(context.Background())
	defer cancel()
	var received atomic.Int64
	ask()
	for range number("downloads") {
		go func() {
			for bulk.Err() == nil {
				get(bulk, fmt.Sprintf("/bytes?size=%d", 256*mib), func(n int) bool { received.Add(int64(n)); return true })
			}
		}()
	}
	time.Sleep(seconds("warmup"))
	received.Store(0)
	var times []float64
	w := measure()
	until := time.Now().Add(seconds("seconds"))
	for start := time.Now(); start.Before(until); start = time.Now() {
		ask()
		times = append(times, time.Since(start).Seconds())
	}
	m := w.stop().metrics(float64(received.Load()) / mib).latencies(times)
	m["requests"] = float64(len(times))
	return m
}

func fanin() metrics {
	many, wait := number("concurrency"), parameters["wait"]
	ramp := max(wait, 1)
	running, cancel := context.WithCancel(context.Background())
	defer cancel()
	var lock sync.Mutex
	var late []float64
	var started atomic.Int64
	ask()
	for i := range many {
		go func() {
			time.Sleep(time.Duration(float64(i) / float64(many) * ramp * float64(time.Second)))
			started.Add(1)
			for {
				mine := wait * (0.75 + rand.Float64()/2)
				start := time.Now()
				if post(running, fmt.Sprintf("%s/answer?size=500&wait=%.6fs", base, mine)) != nil {
					return
				}
				lock.Lock()
				late = append(late, time.Since(start).Seconds()-mine)
				lock.Unlock()
			}
		}()
	}
	time.Sleep(time.Duration(ramp*float64(time.Second)))
	for started.Load() < int64(many) {
		time.Sleep(50 * time.Millisecond)
	}
	time.Sleep(seconds("warmup"))
	lock.Lock()
	late = nil
	lock.Unlock()
	w := measure()
	time.Sleep(seconds("seconds"))
	w.stop()
	lock.Lock()
	defer lock.Unlock()
	return w.metrics(float64(len(late))).latencies(late)
}

func slow() metrics {
	before := resident()
	ask()
	w := measure()
	together(number("requests"), func(int) {
		check(post(context.Background(), fmt.Sprintf("%s/answer?size=500&wait=%gs", base, parameters["wait"])))
	})
	m := w.stop().metrics(parameters["requests"])
	m["grown_mib"] = (resident() - before) / 1024
	return m
}

func idle() metrics {
	var addresses []string
	aside("GET", "/addresses", &addresses)
	addresses = addresses[:number("connections")]
	ask()
	runtime.GC()
	before := resident()
	room := make(chan bool, 20)
	together(len(addresses), func(i int) {
		room <- true
		check(post(context.Background(), "https://"+addresses[i]+"/answer?size=500"))
		<-room
	})
	time.Sleep(seconds("warmup"))
	runtime.GC()
	grown := resident() - before
	w := measure()
	time.Sleep(seconds("seconds"))
	m := w.stop().metrics(float64(len(addresses)))
	m["resident_kib"] = grown / float64(len(addresses))
	m["busy_per_thousand"] = m["client_busy"] / float64(len(addresses)) * 1000
	return m
}

func reconnect() metrics {
	var times []float64
	cost := 0.0
	ask()
	w := measure()
	for range number("repeats") {
		aside("POST", "/close", nil)
		time.Sleep(seconds("pause"))
		before, start := cpu(), time.Now()
		ask()
		times = append(times, time.Since(start).Seconds())
		cost += cpu() - before
	}
	m := w.stop().metrics(float64(len(times))).latencies(times)
	m["cpu_us"] = cost / float64(len(times)) * 1e6
	return m
}

func wan() metrics {
	var rates []float64
	ask()
	w := measure()
	for range number("repeats") {
		start, received := time.Now(), 0
		check(get(context.Background(), fmt.Sprintf("/bytes?size=%d", number("mib")*mib), func(n int) bool {
			received += n
			return time.Since(start) < seconds("seconds")
		}))
		rates = append(rates, float64(received)/time.Since(start).Seconds())
	}
	link := parameters["mbit"] * 1e6 / 8
	m := w.stop().metrics(float64(len(rates)))
	m["of_link"], m["first_of_link"] = percentile(rates, 0.5)/link, rates[0]/link
	return m
}

var scenarios = map[string]func() metrics{
	"rr": rr, "download": download, "upload": upload, "sse": sse, "bulk-latency": bulkLatency, "fanin": fanin,
	"slow": slow, "idle": idle, "reconnect": reconnect, "wan": wan,
}

func main() {
	ca := flag.String("ca", "", "certificate authority, a PEM `file`")
	flag.StringVar(&base, "url", "", "the server")
	flag.StringVar(&statsAddress, "stats", "", "where the server tells its own `host:port`")
	flag.Parse()
	for _, argument := range flag.Args()[1:] {
		name, value, _ := strings.Cut(argument, "=")
		parsed, err := strconv.ParseFloat(value, 64)
		check(err)
		parameters[name] = parsed
	}
	pem, err := os.ReadFile(*ca)
	check(err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	var protocols http.Protocols
	protocols.SetHTTP2(true)
	client = &http.Client{Timeout: time.Minute, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, ClientSessionCache: tls.NewLRUClientSessionCache(0)},
		Protocols:       &protocols,
		HTTP2:           &http.HTTP2Config{SendPingTimeout: seconds("ping")},
	}}
	check(json.NewEncoder(os.Stdout).Encode(scenarios[flag.Arg(0)]()))
}
