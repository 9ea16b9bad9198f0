// Package domain is a libvirt guest of the lab: it defines, starts and drives guests from inside the lab's host VM.
//
// A guest is busybox, cryptsetup and the agent in an initramfs. Its first serial port is its console, a file that tests
// read; on a second one a loop runs the commands that Run sends.
package domain

import (
	"bytes"
	"cmp"
	"context"
	_ "embed"
	"encoding/xml"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"text/template"

	"keybroker/e2e/cpio"
)

const (
	// the guests' disks, initramfs and kernel; libvirt makes these files QEMU's while a guest runs
	folder = "/var/lib/lab"
	// the console files, in the folder that outlives the host VM
	consoles = "/out"
	kernel   = "/boot/vmlinux"
	initrd   = "/share/guest.cpio"
)

// Spec says what a guest is.
type Spec struct {
	Name string
	UUID string
	// Was is the name that its files have, where that is not Name: a domain that is renamed keeps them.
	Was string
	// Keys are the names that the domain's metadata asks for; none: the domain has no metadata of ours.
	Keys []string
	// Agent is the agent's configuration, /etc/keybroker/agent.toml; empty: the guest has none.
	Agent string
	// Files are further files of the guest's initramfs, by path without the leading slash; they are executable.
	Files map[string][]byte
	// Cmdline is appended to the kernel's command line.
	Cmdline string
}

// Standard are the guests that every lab has: web1 and web2 have a policy, web3 asks for a key and has none, plain is
// nothing to keybroker.
var Standard = []Spec{
	{Name: "web1", UUID: "11111111-1111-4111-8111-111111111111", Keys: []string{"disk"}},
	{Name: "web2", UUID: "22222222-2222-4222-8222-222222222222", Keys: []string{"disk"}},
	{Name: "web3", UUID: "33333333-3333-4333-8333-333333333333", Keys: []string{"disk"}},
	{Name: "plain", UUID: "44444444-4444-4444-8444-444444444444"},
}

// Find returns the standard guest of a name.
func Find(name string) (Spec, error) {
	for _, s := range Standard {
		if s.Name == name {
			return s, nil
		}
	}
	return Spec{}, fmt.Errorf("the lab has no guest %q of its own", name)
}

// AgentConfig is the agent's configuration for a guest whose first key opens its data disk. The pin is what
// `keybroker identity` prints.
func AgentConfig(pin, key string) string {
	return fmt.Sprintf("tier = \"vm\"\nbroker = [%q]\n[[key]]\nname = %q\nsink = \"luks\"\ndevice = \"/dev/vdb\"\nmapper = \"data\"\n", pin, key)
}

// Dir is where a guest's files are.
func (s Spec) Dir() string { return filepath.Join(folder, cmp.Or(s.Was, s.Name)) }

// Kernel is the kernel that all guests boot.
func (s Spec) Kernel() string { return filepath.Join(folder, "vmlinux") }

// Console is the file that the guest's console is appended to.
func (s Spec) Console() string { return filepath.Join(consoles, cmp.Or(s.Was, s.Name)+".console") }

//go:embed domain.xml
var domainXML string

var domainTemplate = template.Must(template.New("domain").Parse(domainXML))

// XML is the domain as libvirt takes it.
func (s Spec) XML() string {
	var out bytes.Buffer
	if err := domainTemplate.Execute(&out, s); err != nil {
		panic(err) // a field that the template names is missing
	}
	return out.String()
}

// Define writes the guest's files, makes blank disks where it has none yet, and defines it in libvirt. A guest that is
// defined already is changed; while it runs, the change counts from its next start.
func (s Spec) Define(ctx context.Context) error {
	if err := s.WriteFiles(); err != nil {
		return err
	}
	path := filepath.Join(s.Dir(), "domain.xml")
	if err := os.WriteFile(path, []byte(s.XML()), 0o644); err != nil {
		return err
	}
	_, err := Virsh(ctx, "define", path)
	return err
}

// WriteFiles writes kernel, initramfs and, where there are none yet, blank disks: all that the domain's XML names. The
// initramfs is replaced, not written to, so a running guest keeps its own.
func (s Spec) WriteFiles() error {
	if err := os.MkdirAll(s.Dir(), 0o755); err != nil {
		return err
	}
	if err := copyFile(s.Kernel(), kernel); err != nil {
		return err
	}
	base, err := os.ReadFile(initrd)
	if err != nil {
		return err
	}
	if err := replaceFile(filepath.Join(s.Dir(), "initrd"), append(base, s.archive()...)); err != nil {
		return err
	}
	for disk, size := range map[string]int64{"vda.img": 16 << 20, "vdb.img": 64 << 20} {
		if err := blankDisk(filepath.Join(s.Dir(), disk), size); err != nil {
			return err
		}
	}
	return nil
}

// archive holds the files that are this guest's alone.
func (s Spec) archive() []byte {
	var a cpio.Archive
	if s.Agent != "" {
		a.Add("etc/keybroker/agent.toml", 0o644, []byte(s.Agent))
	}
	for path, content := range s.Files {
		a.Add(path, 0o755, content)
	}
	return a.Bytes()
}

func copyFile(target, source string) error {
	if _, err := os.Stat(target); err == nil {
		return nil
	}
	content, err := os.ReadFile(source)
	if err != nil {
		return err
	}
	return replaceFile(target, content)
}

func replaceFile(path string, content []byte) error {
	next := path + ".new"
	if err := os.WriteFile(next, content, 0o644); err != nil {
		return err
	}
	return os.Rename(next, path)
}

func blankDisk(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Truncate(size)
}

// Virsh runs virsh on the system's libvirt and returns what it prints; an error has it too.
func Virsh(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "virsh", append([]string{"-q", "-c", "qemu:///system"}, args...)...)
	out, err := cmd.CombinedOutput()
	text := strings.TrimSpace(string(out))
	if err != nil {
		return text, fmt.Errorf("virsh %s: %w: %s", strings.Join(args, " "), err, text)
	}
	return text, nil
}

// CID is the context identifier that the running guest's vsock has.
func (s Spec) CID(ctx context.Context) (uint32, error) {
	text, err := Virsh(ctx, "dumpxml", s.Name)
	if err != nil {
		return 0, err
	}
	var live struct {
		CID struct {
			Address uint32 `xml:"address,attr"`
		} `xml:"devices>vsock>cid"`
	}
	if err := xml.Unmarshal([]byte(text), &live); err != nil {
		return 0, fmt.Errorf("reading the XML of %s: %w", s.Name, err)
	}
	if live.CID.Address == 0 {
		return 0, fmt.Errorf("%s has no CID; is it running?", s.Name)
	}
	return live.CID.Address, nil
}
