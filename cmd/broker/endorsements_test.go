package main

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"keybroker/attest"
	"keybroker/attest/snp"
	"keybroker/attest/snp/snptest"
)

func sample(name string) string { return filepath.Join(samples, name) }

// A stored sample is verified without --certs; an altered one is found, and not used.
func TestEndorsements(t *testing.T) {
	dir := t.TempDir()
	in := []string{"--state-dir", dir}
	step := func(want int, out string, args ...string) string {
		t.Helper()
		status, stdout, stderr := call(t, append(slices.Clone(in), args...)...)
		if status != want || !strings.Contains(stdout+stderr, out) {
			t.Errorf("%q: status %d, expected %d and %q\n%s%s", args, status, want, out, stdout, stderr)
		}
		return stdout
	}
	step(1, "nothing was stored here yet", "endorsements", "list")
	step(5, "has it; give it with --certs, or run `keybroker --state-dir", "explain", "--evidence", sample("zen4c-v5.report.bin"))
	step(5, "hint: import it together with its issuer's", "endorsements", "import", sample("milan-v3-vlek.vlek.der"))
	step(5, "got none", "endorsements", "import", writeFile(t, "empty", nil))
	step(5, "reading", "endorsements", "import", writeFile(t, "text", []byte("text")))
	step(1, "no such file", "endorsements", "import", "nonesuch")
	step(0, "0 files, 0 refused", "endorsements", "verify")

	extended := writeFile(t, "extended", append(readSample(t, "zen4c-v5.report.bin"), vcekTable(t)...))
	step(0, "stored vcek/Genoa-b5f9a4c8", "endorsements", "import", extended)
	step(0, "kept   vcek/Genoa-b5f9a4c8", "endorsements", "import", sample("zen4c-v5.vcek.der"))
	step(0, "stored vlek-Milan-", "endorsements", "import", sample("milan-v3-vlek.vlek.der"), sample("milan.ask-ark-asvk.pem"))
	step(0, "-0-0-0-0-9.der", "endorsements", "import", sample("turin.vcek.der"))
	table := step(0, "fmc 0, bootloader 0, tee 0, snp 0, microcode 9", "endorsements", "list")
	if lines := strings.Split(table, "\n"); len(lines) != 8 || !strings.Contains(table, "expired  VLEK  Milan    provider \"CN=cc-us-east-2.amazonaws.com\"") {
		t.Errorf("%s", table)
	}
	checkEndorsementsJSON(t, step(0, "", "endorsements", "list", "--json"))
	step(0, "6 files, 0 refused", "endorsements", "verify")
	step(0, "verdict: genuine", "explain", "--evidence", sample("zen4c-v5.report.bin"))
	step(0, "verdict: genuine", "explain", "--evidence", sample("milan-v3-vlek.report.bin"), "--at", "2025-06-01")
	step(0, "verdict: genuine", "explain", "--certs", sample("milan-v3-vlek.vlek.der"), "--at", "2025-06-01")
	status, out, _ := call(t, "explain", "--evidence", sample("zen4c-v5.report.bin"), "--endorsements", filepath.Join(dir, "endorsements"))
	if status != 0 || !strings.Contains(out, "verdict: genuine") {
		t.Errorf("status %d\n%s", status, out)
	}
	step(1, "opening the store of endorsements", "explain", "--evidence", sample("zen4c-v5.report.bin"), "--endorsements", filepath.Join(dir, "nonesuch"))

	names, err := filepath.Glob(filepath.Join(dir, "endorsements/vcek/Genoa-*"))
	if err != nil || len(names) != 1 {
		t.Fatalf("%q, %v", names, err)
	}
	if err := os.WriteFile(names[0], readSample(t, "milan-v2-a.vcek.der"), 0o600); err != nil {
		t.Fatal(err)
	}
	step(5, "refused vcek/Genoa-b5f9a4c8", "endorsements", "verify")
	step(0, "refused  vcek/Genoa-b5f9a4c8", "endorsements", "list")
	step(5, "warning: endorsements: not used: vcek/Genoa-b5f9a4c8", "explain", "--evidence", sample("zen4c-v5.report.bin"))
	step(0, "stored vcek/Genoa-b5f9a4c8", "endorsements", "import", extended)
	step(0, "6 files, 0 refused", "endorsements", "verify")
}

func checkEndorsementsJSON(t *testing.T, out string) {
	t.Helper()
	var list []struct {
		File, State, Problem, Kind, Product, Provider, Serial string
		ChipID                                                string `json:"chip_id"`
		TCB                                                   map[string]int
		From, Until                                           time.Time
	}
	if err := json.Unmarshal([]byte(out), &list, json.MatchCaseInsensitiveNames(true), json.RejectUnknownMembers(true)); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, e := range list {
		switch {
		case e.File == "" || e.State == "" || e.Product == "" || e.From.IsZero() || e.Until.IsZero() || e.Problem != "":
			t.Errorf("%+v", e)
		case e.Kind == "VCEK" && (len(e.ChipID) != 2*snp.HardwareIDSize(e.Product) || len(e.TCB) != len(snp.TCBParts(e.Product))):
			t.Errorf("%+v", e)
		case e.Kind == "VLEK" && (e.State != "expired" || e.Provider == "" || e.TCB["snp"] != 24):
			t.Errorf("%+v", e)
		}
	}
	if len(list) != 6 {
		t.Errorf("%d endorsements", len(list))
	}
}

// keyServer serves a real certificate as AMD's key service does, and counts the requests.
func keyServer(t *testing.T) (server *httptest.Server, asked func() []string) {
	t.Helper()
	var mu sync.Mutex
	var paths []string
	vcek := readSample(t, "zen4c-v5.vcek.der")
	server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		paths = append(paths, r.URL.RequestURI())
		switch {
		case strings.HasPrefix(r.URL.Path, "/vcek/v1/Genoa/b5f9") && r.URL.RawQuery == "blSPL=10&teeSPL=0&snpSPL=27&ucodeSPL=27":
			w.Write(vcek)
		case strings.HasPrefix(r.URL.Path, "/vcek/v1/Milan/"):
			w.Write(vcek)
		case strings.HasPrefix(r.URL.Path, "/busy/"):
			w.Header().Set("Retry-After", "3600")
			w.WriteHeader(http.StatusTooManyRequests)
		default:
			http.NotFound(w, r)
		}
	}))
	t.Cleanup(server.Close)
	return server, func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(paths)
	}
}

// What fetch gets, it gets once; each class of failure has its status, and stores nothing.
func TestEndorsementsFetch(t *testing.T) {
	server, asked := keyServer(t)
	store := filepath.Join(t.TempDir(), "store")
	fetch := func(want int, out string, args ...string) {
		t.Helper()
		args = append([]string{"endorsements", "fetch", "--endorsements", store, "--wait", "0s"}, args...)
		if !slices.Contains(args, "--url") {
			args = append(args, "--url", server.URL)
		}
		status, stdout, stderr := call(t, args...)
		if status != want || !strings.Contains(stdout+stderr, out) {
			t.Errorf("%q: status %d, expected %d and %q\n%s%s", args, status, want, out, stdout, stderr)
		}
	}
	chip := strings.Repeat("00", 63) + "01"
	fetch(0, "stored vcek/Genoa-b5f9a4c8", "--evidence", sample("zen4c-v5.report.bin"))
	fetch(0, "kept    it is stored already", "--evidence", sample("zen4c-v5.report.bin"))
	fetch(3, "may be asked again at", "--product", "Genoa", "--crl")
	if n := asked(); len(n) != 1 {
		t.Errorf("%q", n)
	}
	for _, c := range []struct {
		status int
		out    string
		url    string
		args   []string
	}{
		{4, "does not have it", "/", []string{"--product", "Genoa", "--chip-id", chip, "--tcb", "microcode=1,snp=2,tee=0,bootloader=3"}},
		{5, "expected the VCEK of chip", "/", []string{"--product", "Milan", "--chip-id", chip, "--tcb", "bootloader=0,tee=0,snp=0,microcode=0"}},
		{5, "expected the VCEK of chip", "/", []string{"--product", "Milan", "--evidence", sample("milan-v2-a.report.bin")}},
		{3, "may be asked again at", "/busy", []string{"--evidence", sample("milan-v2-a.report.bin"), "--product", "Milan"}},
		{3, "not available", "http://127.0.0.1:1", []string{"--product", "Turin", "--ca"}},
	} {
		store = filepath.Join(t.TempDir(), "store") // of its own: no turn to wait for
		if !strings.Contains(c.url, "//") {
			c.url = server.URL + c.url
		}
		fetch(c.status, c.out, append(c.args, "--url", c.url)...)
		if names, err := filepath.Glob(filepath.Join(store, "[^.]*")); err != nil || len(names) > 0 {
			t.Errorf("stored %q, %v", names, err)
		}
	}
	before := len(asked())
	fetch(4, "AMD gives to the provider alone", "--evidence", sample("milan-v3-vlek.report.bin"))
	fetch(2, "does not say of which line", "--evidence", sample("milan-v2-a.report.bin"))
	fetch(2, "expected the line that the report is of", "--evidence", sample("zen4c-v5.report.bin"), "--product", "Milan")
	fetch(2, "expected what to get")
	fetch(2, "expected what to get", "--product", "Milan")
	fetch(2, "nothing is stored that says of which lines", "--crl")
	fetch(2, "--product: expected Milan, Genoa, Turin", "--product", "Rome", "--crl")
	fetch(2, "--chip-id: expected 16 hexadecimal digits for Turin", "--product", "Turin", "--chip-id", chip, "--tcb", "snp=1")
	fetch(2, "--chip-id: expected 128", "--product", "Milan", "--chip-id", "00", "--tcb", "snp=1")
	fetch(2, "--tcb: expected bootloader too", "--product", "Milan", "--chip-id", chip, "--tcb", "snp=1")
	for _, tcb := range []string{"snp=256", "snp=1,snp=1", "fmc=1", "snp", "", "snp=-1"} {
		fetch(2, "--tcb: expected each of", "--product", "Milan", "--chip-id", chip, "--tcb", tcb)
	}
	fetch(2, "--url: ", "--crl", "--product", "Milan", "--url", "kdsintf.amd.com")
	fetch(5, "reading", "--evidence", sample("zen4c-v5.vcek.der"))
	if n := len(asked()); n != before {
		t.Errorf("%d requests", n-before)
	}
}

// Several processes that want the same at once make one request.
func TestFetchInProcesses(t *testing.T) {
	server, asked := keyServer(t)
	dir := t.TempDir()
	var group sync.WaitGroup
	for range 3 {
		group.Go(func() {
			out, err := exec.CommandContext(t.Context(), "keybroker", "--state-dir", dir, "endorsements", "fetch",
				"--evidence", sample("zen4c-v5.report.bin"), "--url", server.URL).CombinedOutput()
			if err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
	group.Wait()
	if n := asked(); len(n) != 1 {
		t.Errorf("%q", n)
	}
}

// Revocation lists from the store count, and satisfy a policy that requires one; with the key service gone.
func TestStoredRevocationLists(t *testing.T) {
	authority, err := snptest.New(snp.Genoa)
	if err != nil {
		t.Fatal(err)
	}
	report := readSample(t, "zen4c-v5.report.bin")
	tcb := attest.TCB{Bootloader: 10, SNP: 27, Microcode: 27}
	key, err := authority.Issue(snptest.Template{Kind: attest.VCEK, HWID: report[0x1a0:0x1e0], TCB: tcb})
	if err != nil {
		t.Fatal(err)
	}
	if report, err = key.Sign(report); err != nil {
		t.Fatal(err)
	}
	revoked := []int64{}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasSuffix(r.URL.Path, "/crl"):
			der, err := authority.CRL(time.Now().Add(-time.Hour), time.Now().Add(time.Hour), revoked...)
			if err != nil {
				t.Error(err)
			}
			w.Write(der)
		case strings.HasPrefix(r.URL.Path, "/vcek/v1/Genoa/b5f9"):
			w.Write(key.DER)
		}
	}))
	defer server.Close()
	dir, evidence := t.TempDir(), writeFile(t, "report.bin", report)
	policy := policyFor(t, report, "Genoa", vcekOnly)
	octets, err := os.ReadFile(policy)
	if err != nil {
		t.Fatal(err)
	}
	required := writeFile(t, "snp.toml", bytes.Replace(octets, []byte(`"when-given"`), []byte("\"required\"\ncrl_max_age = \"48h\""), 1))
	root := authority.Root()
	step := func(want int, out string, args ...string) {
		t.Helper()
		var stdout, stderr bytes.Buffer
		g := &globals{stdin: strings.NewReader(""), stdout: &stdout, stderr: &stderr, roots: []snp.Root{root}}
		status := run(t.Context(), g, append([]string{"--state-dir", dir}, args...))
		if status != want || !strings.Contains(stdout.String()+stderr.String(), out) {
			t.Errorf("%q: status %d, expected %d and %q\n%s%s", args, status, want, out, &stdout, &stderr)
		}
	}
	explain := []string{"explain", "--evidence", evidence, "--policy", required}
	step(0, "stored vcek/Genoa-b5f9", "endorsements", "fetch", "--evidence", evidence, "--url", server.URL)
	step(7, "refused, revocation: crl:", explain...)
	forget(t, dir) // or this test takes ten seconds
	step(0, "stored crl-Genoa-", "endorsements", "fetch", "--crl", "--url", server.URL)
	step(0, "", explain...)
	revoked = append(revoked, 2)
	forget(t, dir)
	step(0, "stored crl-Genoa-", "endorsements", "fetch", "--crl", "--url", server.URL)
	server.Close()
	step(7, "refused, revocation: revoked:", explain...)
	step(0, "2 files, 0 refused", "endorsements", "verify")
}

// forget makes the next fetch's turn come at once.
func forget(t *testing.T, stateDir string) {
	t.Helper()
	notes, err := filepath.Glob(filepath.Join(stateDir, "endorsements", ".keyservice-*.json"))
	if err != nil || len(notes) != 1 {
		t.Fatalf("%q, %v", notes, err)
	}
	if err := os.Remove(notes[0]); err != nil {
		t.Fatal(err)
	}
}
