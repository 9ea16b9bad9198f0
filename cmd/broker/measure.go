package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"keybroker/attest/launch"
	"keybroker/internal/policy"
)

// measureFlags are what decides on a launch digest, and how it is printed.
type measureFlags struct {
	firmware, kernel, initrd string
	append                   string
	vcpus                    string
	vcpuType                 string
	features                 string
	asJSON                   bool
	name, until              string // of entries for a policy
	alone                    bool   // that is a file of its own
}

func newMeasureCommand(g *globals) *cobra.Command {
	f := &measureFlags{}
	c := &cobra.Command{
		Use:   "measure",
		Short: "Compute the launch digest (MEASUREMENT) of an SEV-SNP guest under QEMU",
		Long: `Compute the launch digest, MEASUREMENT in a report, of an SEV-SNP guest that QEMU starts: from its firmware, from kernel, initrd
and command line if it is started with -kernel and kernel-hashes=on, and from its virtual processors.

--vcpus takes one number, or a range such as 1-64: each number has its own digest. --policy-name prints [[snp.measurement]] entries,
which belong below a [[snp]] table of policy.toml or a drop-in, with the files' hashes as comments; with --standalone [[measurement]]
entries, for the file that explain --evidence --policy takes.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return g.measure(f) },
	}
	c.Flags().StringVar(&f.firmware, "firmware", "", "`FILE` with OVMF, as QEMU gets it")
	c.Flags().StringVar(&f.kernel, "kernel", "", "`FILE` with the kernel; without it the guest boots from a disk")
	c.Flags().StringVar(&f.initrd, "initrd", "", "`FILE` with the initrd")
	c.Flags().StringVar(&f.append, "append", "", "the kernel's command `LINE`")
	c.Flags().StringVar(&f.vcpus, "vcpus", "", "how many virtual processors: `N`, or a range N-M")
	c.Flags().StringVar(&f.vcpuType, "vcpu-type", "", "QEMU's `NAME` of the processors, such as EPYC-v4, or their CPUID signature in hexadecimal, such as 0x800f12")
	c.Flags().StringVar(&f.features, "guest-features", "0x1", "SEV_FEATURES as a `NUMBER`; QEMU sets 0x1")
	c.Flags().BoolVar(&f.asJSON, "json", false, "print JSON")
	c.Flags().StringVar(&f.name, "policy-name", "", "print entries with this `NAME` for a policy")
	c.Flags().StringVar(&f.until, "until", "", "the `DATE` on which those entries end")
	c.Flags().BoolVar(&f.alone, "standalone", false, "the entries are for an appraisal policy in a file of its own")
	for _, required := range []string{"firmware", "vcpus", "vcpu-type"} {
		_ = c.MarkFlagRequired(required)
	}
	c.MarkFlagsMutuallyExclusive("json", "policy-name")
	return c
}

// A measured is a launch digest with the number of processors that it is for.
type measured struct {
	VCPUs       int    `json:"vcpus"`
	Measurement string `json:"measurement"`
}

// A measurement is what measure prints: the digests, and what they were computed from.
type measurement struct {
	Firmware  source     `json:"firmware"`
	Kernel    *source    `json:"kernel,omitempty"`
	Initrd    *source    `json:"initrd,omitempty"`
	Append    *string    `json:"append,omitempty"`
	VCPUType  string     `json:"vcpu_type"`
	Signature string     `json:"vcpu_signature"`
	Features  string     `json:"guest_features"`
	Digests   []measured `json:"digests"`
}

// A source is a file that was measured.
type source struct {
	Name   string `json:"name"`
	SHA256 string `json:"sha256"`
	sum    [sha256.Size]byte
}

func (g *globals) measure(f *measureFlags) error {
	least, most, err := parseRange(f.vcpus)
	if err != nil {
		return usageError{fmt.Errorf("--vcpus: %w", err)}
	}
	if err := f.check(); err != nil {
		return usageError{err}
	}
	m := &measurement{VCPUType: f.vcpuType}
	guest, err := f.guest(m)
	if err != nil {
		return err
	}
	digests, err := guest.Digests(least, most)
	if err != nil {
		return err
	}
	for i, d := range digests {
		m.Digests = append(m.Digests, measured{least + i, hex.EncodeToString(d[:])})
	}
	switch {
	case f.asJSON:
		return writeJSON(g.stdout, m)
	case f.name != "":
		return m.printPolicy(g.stdout, f)
	}
	return m.print(g.stdout)
}

// entryName is what an entry of a policy may be called here.
var entryName = regexp.MustCompile(`^[A-Za-z0-9 .,:+_-]{1,200}$`)

// check finds flags that mean nothing together.
func (f *measureFlags) check() error {
	switch {
	case f.kernel == "" && f.initrd != "":
		return fmt.Errorf("--initrd: expected --kernel beside it: without it QEMU measures no files")
	case f.kernel == "" && f.append != "":
		return fmt.Errorf("--append: expected --kernel beside it: without it QEMU measures no command line")
	case f.name != "" && !entryName.MatchString(f.name):
		return fmt.Errorf("--policy-name: expected up to 200 letters, digits, spaces and any of . , : + _ -, got %.40q", f.name)
	case f.until != "" && f.name == "":
		return fmt.Errorf("--until: expected --policy-name beside it")
	case f.alone && f.name == "":
		return fmt.Errorf("--standalone: expected --policy-name beside it")
	}
	if f.until != "" {
		if _, err := policy.ParseDate(f.until); err != nil {
			return fmt.Errorf("--until: %w", err)
		}
	}
	return nil
}

// parseRange reads "4" or "1-64".
func parseRange(s string) (least, most int, err error) {
	first, last, isRange := strings.Cut(s, "-")
	if !isRange {
		last = first
	}
	least, err = strconv.Atoi(first)
	if err == nil {
		most, err = strconv.Atoi(last)
	}
	if err != nil || least < 1 || most < least || most > launch.MaxVCPUs {
		return 0, 0, fmt.Errorf("expected a number from 1 to %d, or a range such as 1-64, got %.20q", launch.MaxVCPUs, s)
	}
	return least, most, nil
}

// guest reads the files, and notes in m what they are.
func (f *measureFlags) guest(m *measurement) (*launch.Guest, error) {
	g := &launch.Guest{}
	var err error
	if g.CPU, err = parseProcessor(f.vcpuType); err != nil {
		return nil, usageError{fmt.Errorf("--vcpu-type: %w", err)}
	}
	if g.Features, err = strconv.ParseUint(f.features, 0, 64); err != nil {
		return nil, usageError{fmt.Errorf("--guest-features: expected a number such as 0x1, got %.20q", f.features)}
	}
	m.Signature, m.Features = fmt.Sprintf("%#x", g.CPU), fmt.Sprintf("%#x", g.Features)
	if g.Firmware, err = readFirmware(f.firmware); err != nil {
		return nil, err
	}
	m.Firmware = newSource(f.firmware, sha256.Sum256(g.Firmware))
	if f.kernel == "" {
		return g, nil
	}
	g.Boot = &launch.Boot{Append: f.append}
	m.Append = &f.append
	if m.Kernel, err = hashFile(f.kernel); err != nil {
		return nil, err
	}
	g.Boot.Kernel, g.Boot.Initrd = m.Kernel.sum, sha256.Sum256(nil)
	if f.initrd == "" {
		return g, nil
	}
	if m.Initrd, err = hashFile(f.initrd); err != nil {
		return nil, err
	}
	g.Boot.Initrd = m.Initrd.sum
	return g, nil
}

// parseProcessor takes a name of QEMU's or a signature.
func parseProcessor(s string) (uint32, error) {
	if !strings.HasPrefix(s, "0x") {
		return launch.Signature(s)
	}
	n, err := strconv.ParseUint(s, 0, 32)
	if err != nil {
		return 0, fmt.Errorf("expected a signature of 32 bits such as 0x800f12, got %.20q", s)
	}
	return uint32(n), nil
}

func readFirmware(name string) ([]byte, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return io.ReadAll(io.LimitReader(file, launch.MaxFirmware+1))
}

func newSource(name string, sum [sha256.Size]byte) source {
	return source{Name: filepath.Base(name), SHA256: hex.EncodeToString(sum[:]), sum: sum}
}

// hashFile hashes a file of any size.
func hashFile(name string) (*source, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	h := sha256.New()
	if _, err := io.Copy(h, file); err != nil {
		return nil, err
	}
	s := newSource(name, [sha256.Size]byte(h.Sum(nil)))
	return &s, nil
}

func (m *measurement) print(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "VCPUS\tMEASUREMENT")
	for _, d := range m.Digests {
		fmt.Fprintf(t, "%d\t%s\n", d.VCPUs, d.Measurement)
	}
	return t.Flush()
}

// printPolicy writes entries for a policy. What is a comment there says what they were made from.
func (m *measurement) printPolicy(w io.Writer, f *measureFlags) error {
	var b strings.Builder
	comment := func(what string, s *source) {
		if s != nil {
			fmt.Fprintf(&b, "# %-8s  %q, SHA-256 %s\n", what, s.Name, s.SHA256)
		}
	}
	comment("firmware", &m.Firmware)
	comment("kernel", m.Kernel)
	comment("initrd", m.Initrd)
	if m.Append != nil {
		fmt.Fprintf(&b, "# append    %q\n", *m.Append)
	}
	fmt.Fprintf(&b, "# vCPUs     %s, signature %s, features %s\n", m.VCPUType, m.Signature, m.Features)
	table := "snp.measurement"
	if f.alone {
		table = "measurement"
	}
	for _, d := range m.Digests {
		fmt.Fprintf(&b, "\n[[%s]]\nname  = %q\nvalue = %q\n", table, fmt.Sprintf("%s, vcpus %d", f.name, d.VCPUs), d.Measurement)
		if f.until != "" {
			fmt.Fprintf(&b, "until = %q\n", f.until)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}
